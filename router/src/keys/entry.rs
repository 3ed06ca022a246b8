//! A line of the file of keys: a name, the SHA-256 of the key, limits.
//!
//! ```text
//! # name   hash                 limits, each optional
//! alice    sha256:9f86d0…       requests_per_minute=600 tokens_per_minute=200000 concurrent=16 weight=2
//! ops      sha256:60303a…       operator
//! ```

use std::fmt;

use super::usage::Limits;

/// Most lines of a file.
const MOST_ENTRIES: usize = 10_000;
/// Most characters of a name.
const MOST_NAME: usize = 64;

/// A key as the router knows it: never the key itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    /// Who has it; the same name on two lines is one client with two keys.
    pub name: String,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// What it may use.
    pub limits: Limits,
    /// Turns in the queue, beside the others' 1 (default 1).
    pub weight: u32,
    /// May tell workers to drain, too.
    pub is_operator: bool,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Reads a file; the error names the line.
pub fn parse(text: &str) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        let entry = entry(line).map_err(|why| format!("line {number}: {why}"))?;
        let differs = |other: &&Entry| {
            other.name == entry.name
                && (&other.limits, other.weight, other.is_operator)
                    != (&entry.limits, entry.weight, entry.is_operator)
        };
        if entries.iter().any(|other| other.hash == entry.hash) {
            return Err(format!(
                "line {number}: the key of another line again; make one with `tandem key new`"
            ));
        }
        if entries.iter().any(|other| differs(&other)) {
            let name = &entry.name;
            return Err(format!(
                "line {number}: {name} has other limits on an earlier line; two keys of one client have the same"
            ));
        }
        entries.push(entry);
        if entries.len() > MOST_ENTRIES {
            return Err(format!("more than {MOST_ENTRIES} keys"));
        }
    }
    match entries.is_empty() {
        true => Err("holds no key; make one with `tandem key new NAME`".into()),
        false => Ok(entries),
    }
}

/// Whether somebody may be called so; names are shown in metrics and logs.
pub fn is_name(name: &str) -> bool {
    let is_sane = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    (1..=MOST_NAME).contains(&name.len()) && name.chars().all(is_sane)
}

fn entry(line: &str) -> Result<Entry, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    if !is_name(name) {
        return Err(format!("the name: letters, digits and -_.@, at most {MOST_NAME}"));
    }
    let hash = words.next().and_then(|word| word.strip_prefix("sha256:")).and_then(unhex);
    // The word is not shown: somebody may have put the key itself there.
    let hash = hash.ok_or("the second word is not sha256: and 64 hexadecimal digits")?;
    let mut entry =
        Entry { name: name.to_owned(), hash, limits: Limits::default(), weight: 1, is_operator: false };
    for word in words {
        if word == "operator" {
            entry.is_operator = true;
            continue;
        }
        let (field, value) = word.split_once('=').ok_or_else(|| format!("{word}: not NAME=NUMBER"))?;
        let number: u32 = value
            .parse()
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| format!("{field}: a whole number above 0; leave it out for no limit"))?;
        match field {
            "requests_per_minute" => entry.limits.requests_per_minute = Some(number),
            "tokens_per_minute" => entry.limits.tokens_per_minute = Some(number),
            "concurrent" => entry.limits.concurrent = Some(number),
            "weight" if number <= 100 => entry.weight = number,
            "weight" => return Err("weight: 1 to 100".into()),
            _ => {
                return Err(format!(
                    "{field}: unknown; there are requests_per_minute, tokens_per_minute, concurrent, weight and operator"
                ));
            }
        }
    }
    Ok(entry)
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn a_line_is_a_name_a_hash_and_limits() {
        let text = format!("# keys\n\nalice sha256:{HASH} requests_per_minute=60 weight=3 # note\n");
        let entries = parse(&text).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].name.as_str(), entries[0].weight, entries[0].hash[0]), ("alice", 3, 0x9f));
        let limits = &entries[0].limits;
        assert_eq!((limits.requests_per_minute, limits.tokens_per_minute), (Some(60), None));
    }

    #[test]
    fn each_mistake_names_its_line_and_no_key_is_repeated() {
        let secret = "tdm-0123456789abcdef";
        for (line, words) in [
            (format!("alice {secret}"), "line 1: the second word"),
            (format!("al/ice sha256:{HASH}"), "line 1: the name"),
            (format!("alice sha256:{HASH} concurrent=0"), "concurrent: a whole number above 0"),
            (format!("alice sha256:{HASH} speed=1"), "speed: unknown"),
            (format!("alice sha256:{HASH} weight=101"), "weight: 1 to 100"),
            (format!("alice sha256:{HASH}\nbob sha256:{HASH}"), "line 2: the key of another line"),
            ("# nothing\n".to_owned(), "holds no key"),
        ] {
            let error = parse(&line).unwrap_err();
            assert!(error.contains(words) && !error.contains(secret), "{line}: {error}");
        }
        let other = HASH.replace("9f", "00");
        let text = format!("alice sha256:{HASH} concurrent=1\nalice sha256:{other} concurrent=2");
        assert!(parse(&text).unwrap_err().contains("other limits"));
        assert_eq!(parse(&text.replace("=2", "=1")).unwrap().len(), 2);
    }
}
