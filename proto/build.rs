//! Compiles the .proto files with protox (protoc in Rust), so a build needs no protoc for them.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let ours = ["inference", "operator", "worker", "registry"].map(|name| format!("tandem/v1/{name}.proto"));
    let protos: Vec<String> = ours.into_iter().chain(["keda/externalscaler.proto".to_owned()]).collect();
    for proto in &protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(&protos, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .bytes(".tandem.v1.Reserved.ticket")
        .bytes(".tandem.v1.PrefillRequest.ticket")
        .bytes(".tandem.v1.MoveRequest.ticket")
        .compile_fds(descriptors)?;
    Ok(())
}
