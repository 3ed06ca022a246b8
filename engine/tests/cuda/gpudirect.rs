//! What network cards get of a pool on a GPU. No card takes part: these are the driver's side of it, and the checksums.

use std::sync::Arc;

use engine::cuda::CudaOptions;
use engine::cuda::gpudirect::GpuDirect;
use engine::{Batch, Engine, Segment};

use crate::{cuda, options, prompt, shape, table};

#[test]
fn cells_are_summed_where_they_lie_behind_what_cards_wrote() {
    let config = shape(128, 8, 2);
    let Some(mut engine) = cuda(&config, CudaOptions { publish: true, ..options() }) else { return };
    let (prompt, blocks) = (prompt(333, 3), table(0, 400));
    let segment = Segment { tokens: &prompt, position: 0, blocks: &blocks, samples: &[] };
    engine.forward(&Batch { segments: vec![segment] }, &mut |_| ()).unwrap();
    let kv = engine.kv();
    let layout = *kv.layout();
    let device = Arc::clone(&kv).on_device().expect("a pool that can be shared");
    let cells: Vec<_> =
        (0..layout.layers).flat_map(|layer| blocks[..21].iter().map(move |block| (layer, *block))).collect();
    let want: Vec<u32> = cells.iter().map(|&(layer, block)| kv.source_checksum(layer, block)).collect();
    let places: Vec<usize> = cells.iter().map(|&(layer, block)| layout.offset(layer, block)).collect();
    let bytes = layout.block_bytes();
    assert_eq!(device.sums(&places, bytes).unwrap(), want);
    // From several threads, as connections do.
    std::thread::scope(|scope| {
        for (places, want) in places.chunks(16).zip(want.chunks(16)) {
            let device = &device;
            scope.spawn(move || assert_eq!(device.sums(places, bytes).unwrap(), want));
        }
    });
    assert!(device.sums(&[], bytes).unwrap().is_empty());
    for outside in [layout.total_bytes(), bytes / 2, usize::MAX] {
        assert!(device.sums(&[outside], bytes).is_err(), "{outside}");
    }
    assert!(device.sums(&places, bytes / 2).is_err());
}

#[test]
fn a_pool_is_shown_to_cards_as_far_as_the_driver_says() {
    let Some(engine) = cuda(&shape(128, 8, 2), options()) else { return };
    let (name, says) = GpuDirect::ask(0).unwrap();
    let kv = engine.kv();
    let device = Arc::clone(&kv).on_device().expect("a pool that can be shared");
    match device.expose() {
        Err(error) => {
            println!("{name}, {says:?}: {error}");
            assert!(says.refusal().is_some());
        }
        Ok(exposed) => {
            assert!(says.refusal().is_none() && exposed.address.is_multiple_of(4096));
            match exposed.dmabuf {
                Ok(file) => {
                    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).unwrap();
                    println!("{name}, {says:?}: a dmabuf of {bytes} bytes; peermem {:?}", exposed.peermem);
                    assert!(says.has_dmabuf && bytes >= kv.layout().total_bytes() as u64);
                }
                Err(why) => {
                    println!("{name}, {says:?}: no dmabuf: {why}; peermem {:?}", exposed.peermem);
                    assert!(!why.is_empty());
                }
            }
        }
    }
}
