//! Stop strings: text that might become one is held back until that is decided.

/// Looks for stop strings in a stream of text.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

/// What may be shown after more text came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Shown {
    /// This much; go on.
    Text(String),
    /// This much, then the stop string of that number: the end.
    Stopped(String, usize),
}

impl StopMatcher {
    /// Without stop strings everything passes at once.
    pub fn new(stops: &[String]) -> Self {
        Self { stops: stops.to_vec(), held: String::new() }
    }

    /// Adds text.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let earliest = self
            .stops
            .iter()
            .enumerate()
            .filter_map(|(number, stop)| self.held.find(stop.as_str()).map(|at| (at, number)))
            .min();
        if let Some((at, number)) = earliest {
            self.held.truncate(at);
            return Shown::Stopped(std::mem::take(&mut self.held), number);
        }
        let keep = self.undecided();
        let rest = self.held.split_off(self.held.len() - keep);
        Shown::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The end of the text: what was held back is shown after all.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of the held text that begins a stop string.
    fn undecided(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest.saturating_sub(1));
        (first..self.held.len())
            .filter(|at| self.held.is_char_boundary(*at))
            .find(|at| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..])))
            .map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holds_back_only_what_could_be_a_stop() {
        let mut matcher = StopMatcher::new(&["END".into(), "\n\n".into()]);
        assert_eq!(matcher.push("one E"), Shown::Text("one ".into()));
        assert_eq!(matcher.push("N"), Shown::Text("".into()));
        assert_eq!(matcher.push("x\n"), Shown::Text("ENx".into()));
        assert_eq!(matcher.push("\nmore"), Shown::Stopped("".into(), 1));
    }

    proptest! {
        #[test]
        fn equals_searching_the_whole_text(
            pieces in proptest::collection::vec("[abé]{0,3}", 0..12),
            stops in proptest::collection::vec("[abé]{1,3}", 0..3),
        ) {
            let whole: String = pieces.concat();
            // The earliest *completed* stop wins; with everything at once that is the smallest end.
            let mut matcher = StopMatcher::new(&stops);
            let mut out = String::new();
            let mut stopped = false;
            for piece in pieces.iter().flat_map(|p| p.chars()) {
                match matcher.push(&piece.to_string()) {
                    Shown::Text(text) => out.push_str(&text),
                    Shown::Stopped(text, _) => { out.push_str(&text); stopped = true; break; }
                }
            }
            if !stopped { out.push_str(&matcher.flush()); }
            prop_assert_eq!(stopped, stops.iter().any(|s| whole.contains(s.as_str())));
            prop_assert!(whole.starts_with(&out));
            prop_assert!(!stops.iter().any(|s| out.contains(s.as_str())));
            if !stopped { prop_assert_eq!(out, whole); }
        }
    }
}
