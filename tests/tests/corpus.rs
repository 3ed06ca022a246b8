//! The fuzz corpus (`fuzz/corpus`), and every input that once broke something, replayed on the parsers; cut short and with
//! flipped bits as well.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use tandem_tests::outside::TARGETS;

#[test]
fn every_parser_stands_its_corpus() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for file in std::fs::read_dir(corpus.join(name)).unwrap_or_else(|e| panic!("corpus of {name}: {e}")) {
            let input = std::fs::read(file.unwrap().path()).unwrap();
            target(&input);
            target(&input[..input.len() / 2]);
            for at in (0..input.len()).step_by(1 + input.len() / 16) {
                let mut flipped = input.clone();
                flipped[at] ^= 1 << (at % 8);
                target(&flipped);
            }
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no corpus");
    }
}
