//! Pools whose heads are split otherwise on the two sides, pushed through the real transport: every number lands where the
//! target's layout wants it, whatever the splits and block sizes. No engine splits its heads yet, so the pools are made here.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::kv::convert::Conversion;
use engine::{KvDtype, KvLayout};
use kv_transport::{
    Cell, Grid, Identity, Receiver, ReceiverConfig, Region, Reserve, Route, Sender, SenderConfig, Shard,
};
use proptest::prelude::*;
use tokio::net::TcpListener;

const LAYERS: usize = 2;
const HEAD_DIM: usize = 4;
/// Blocks of every pool: more than a sequence needs, so that its blocks may lie anywhere.
const BLOCKS: usize = 40;

/// A number that names its place.
fn number(layer: usize, side: usize, head: usize, token: usize, element: usize) -> [u8; 2] {
    (((((layer * 2 + side) * 16 + head) * 64 + token) * HEAD_DIM + element) as u16).to_le_bytes()
}

/// A shard's pool, and where in it a sequence's blocks lie.
struct Pool {
    shard: Shard,
    layout: KvLayout,
    table: Vec<u32>,
    region: Region,
}

impl Pool {
    fn new(shard: Shard, block_tokens: usize, tokens: usize) -> Self {
        let (kv_heads, dtype) = (shard.held().len(), KvDtype::Bf16);
        let layout =
            KvLayout { layers: LAYERS, blocks: BLOCKS, kv_heads, block_tokens, head_dim: HEAD_DIM, dtype };
        // Every third block, then those between: not in order.
        let table = (0..layout.blocks_for(tokens)).map(|at| (at * 7 % BLOCKS) as u32).collect();
        Self { shard, layout, table, region: Region::zeroed(layout.total_bytes()) }
    }

    /// The bytes that one block of one layer should have; zeros behind the last token.
    fn expected(&self, layer: usize, at: usize, tokens: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for side in 0..2 {
            for head in self.shard.held() {
                for token in
                    (0..self.layout.block_tokens).map(|within| at * self.layout.block_tokens + within)
                {
                    for element in 0..HEAD_DIM {
                        let is = token < tokens;
                        bytes.extend(if is {
                            number(layer, side, head as usize, token, element)
                        } else {
                            [0; 2]
                        });
                    }
                }
            }
        }
        bytes
    }

    fn fill(&self, tokens: usize) {
        for layer in 0..LAYERS {
            for (at, block) in self.table.iter().enumerate() {
                let bytes = self.expected(layer, at, tokens);
                self.region.copy_in(self.layout.offset(layer, *block), &bytes).unwrap();
            }
        }
    }

    fn block(&self, layer: usize, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.block_bytes()];
        self.region.copy_out(self.layout.offset(layer, block), &mut bytes).unwrap();
        bytes
    }

    /// The same sequence in blocks of another size, as a prefill worker makes them before it sends.
    fn staged(&self, block_tokens: usize, tokens: usize) -> Self {
        let stage = Self::new(self.shard, block_tokens, tokens);
        let conversion = Conversion::between(self.layout, stage.layout).unwrap();
        for layer in 0..LAYERS {
            let sources: Vec<_> = self.table.iter().map(|block| self.block(layer, *block)).collect();
            for (at, block) in stage.table.iter().enumerate() {
                let mut made = vec![0; stage.layout.block_bytes()];
                conversion.fill(at, tokens, |source| &sources[source], &mut made);
                stage.region.copy_in(stage.layout.offset(layer, *block), &made).unwrap();
            }
        }
        stage
    }

    fn grid(&self) -> Grid {
        worker::pool::grid(&self.layout)
    }
}

fn identity(side: &str, at: usize) -> Identity {
    Identity { worker: format!("{side}-{at}"), incarnation: 1 }
}

/// Everything that a source has for a target, as one transfer.
async fn push(source: &Pool, target: &Pool, route: Route, sender: &Sender, receiver: &Receiver) {
    let blocks = source.table.iter().zip(&target.table);
    let pairs: Vec<(u32, u32)> = blocks.flat_map(|(from, to)| route.slots(*from, *to)).collect();
    let reserve = Reserve {
        slots: pairs.iter().map(|(_, to)| *to).collect(),
        meta: Bytes::new(),
        attempt: 1,
        sender: None,
        deadline: Instant::now() + Duration::from_secs(20),
        hold: (),
    };
    let mut landing = receiver.reserve(reserve).unwrap();
    let push = sender.open(landing.ticket().clone(), Arc::new(())).await.unwrap();
    let grid = route.source_grid(&source.grid()).unwrap();
    for plane in 0..grid.planes {
        let cell = |(index, (from, _)): (usize, &(u32, u32))| {
            let checksum = source.region.checksum(0, grid.cell(plane, *from).unwrap()).unwrap();
            Cell { index: index as u32, src_slot: *from, checksum }
        };
        let cells: Vec<Cell> = pairs.iter().enumerate().map(cell).collect();
        push.cells(plane, &cells).await.unwrap();
    }
    push.commit(Bytes::new()).await.unwrap();
    landing.committed().await.unwrap();
}

/// All sources to all targets; then every target is as if it had been computed there.
async fn all_to_all(
    heads: u32,
    (from, to): (u32, u32),
    (from_block, to_block): (usize, usize),
    tokens: usize,
) {
    let pools = |of, block| {
        (0..of)
            .map(move |at| Pool::new(Shard::new(heads, of, at).unwrap(), block, tokens))
            .collect::<Vec<_>>()
    };
    let (sources, targets) = (pools(from, from_block), pools(to, to_block));
    sources.iter().for_each(|source| source.fill(tokens));
    let staged: Vec<_> = sources.iter().map(|source| source.staged(to_block, tokens)).collect();
    for (number, target) in targets.iter().enumerate() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoints = vec![listener.local_addr().unwrap().to_string()];
        let routes: Vec<_> = staged
            .iter()
            .enumerate()
            .filter_map(|(at, source)| Some((at, source, Route::between(source.shard, target.shard)?)))
            .collect();
        let grid = routes[0].2.target_grid(&target.grid()).unwrap();
        let config = ReceiverConfig { endpoints, ..ReceiverConfig::default() };
        let receiver = Receiver::new(identity("decode", number), target.region.clone(), grid, config);
        let serving = receiver.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let receiver = serving.clone();
                tokio::spawn(async move { receiver.serve(stream).await });
            }
        });
        for (at, source, route) in routes {
            let grid = route.source_grid(&source.grid()).unwrap();
            let (region, config) = (source.region.clone(), SenderConfig::default());
            let sender = Sender::new(identity("prefill", at), region, grid, config);
            push(source, target, route, &sender, &receiver).await;
        }
        accepting.abort();
        for layer in 0..LAYERS {
            for (at, block) in target.table.iter().enumerate() {
                let wanted = target.expected(layer, at, tokens);
                assert!(
                    target.block(layer, *block) == wanted,
                    "layer {layer}, block {at} of {:?}",
                    target.shard
                );
            }
            for block in (0..BLOCKS as u32).filter(|block| !target.table.contains(block)) {
                assert!(
                    target.block(layer, block).iter().all(|byte| *byte == 0),
                    "block {block} is nobody's"
                );
            }
        }
    }
}

/// Splits of so many heads.
fn split(heads: u32) -> impl Strategy<Value = u32> {
    let even: Vec<u32> =
        (1..=16).filter(|of| heads.is_multiple_of(*of) || of.is_multiple_of(heads)).collect();
    prop::sample::select(even)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_becomes_any_other(
        (heads, from, to) in (1..=12_u32).prop_flat_map(|heads| (Just(heads), split(heads), split(heads))),
        from_block in 2..20_usize, to_block in 2..20_usize, is_same in any::<bool>(), tokens in 1..60_usize,
    ) {
        let blocks = (from_block, if is_same { from_block } else { to_block });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let run = all_to_all(heads, (from, to), blocks, tokens);
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), run).await.expect("took too long") });
    }
}
