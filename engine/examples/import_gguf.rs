//! `cargo run --release -p engine --example import_gguf -- FILE.gguf FOLDER`

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, gguf, out] = arguments.as_slice() else {
        return Err("usage: import_gguf FILE.gguf FOLDER".into());
    };
    let report = engine::import::import_gguf(Path::new(gguf), Path::new(out), &mut |done, total| {
        print!("\r{:3} %", done * 100 / total.max(1));
    })?;
    println!("\r{report:#?}");
    Ok(())
}
