//! Compiles the .proto files with protox (protoc in Rust), so a build needs no protoc for them.

use prost_types::FileDescriptorSet;
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
    let mut sealed = descriptors.clone();
    let mut open = descriptors;
    keep_services(&mut sealed, |name| SEALED.contains(&name));
    keep_services(&mut open, |name| !SEALED.contains(&name));
    tonic_prost_build::configure()
        .bytes(".tandem.v1.Reserved.ticket")
        .bytes(".tandem.v1.PrefillRequest.ticket")
        .bytes(".tandem.v1.MoveRequest.ticket")
        .bytes(".tandem.v1.ReserveProbeReply.ticket")
        .bytes(".tandem.v1.PushProbeRequest.ticket")
        .compile_fds(open)?;
    // The same package once more: these services only, over the messages that are there already.
    fs::create_dir_all(out.join("sealed"))?;
    tonic_prost_build::configure()
        .out_dir(out.join("sealed"))
        .codec_path("crate::sealed::SealedCodec")
        .extern_path(".tandem.v1", "crate::v1")
        .compile_fds(sealed)?;
    Ok(())
}

/// Between router and workers; see `sealed.rs`.
const SEALED: [&str; 2] = ["PrefillWorker", "DecodeWorker"];

/// Leaves some services out, with what is said of them: locations name a service by its place in the file.
fn keep_services(descriptors: &mut FileDescriptorSet, keep: impl Fn(&str) -> bool) {
    const SERVICE: i32 = 6; // FileDescriptorProto.service
    for file in &mut descriptors.file {
        let mut next = 0..;
        let mut place = |is_kept: bool| if is_kept { next.next() } else { None };
        let places: Vec<Option<i32>> = file.service.iter().map(|s| place(keep(s.name()))).collect();
        file.service.retain(|service| keep(service.name()));
        let Some(info) = &mut file.source_code_info else { continue };
        info.location.retain_mut(|location| match location.path.as_mut_slice() {
            [SERVICE, place, ..] => match places.get(*place as usize) {
                Some(Some(now)) => {
                    *place = *now;
                    true
                }
                _ => false,
            },
            _ => true,
        });
    }
}
