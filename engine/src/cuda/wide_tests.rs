//! Every kernel for many rows against sums made here, of numbers that are exact in each type. Needs a GPU.

use half::bf16;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::*;
use crate::cuda::driver::Stream;
use crate::cuda::kernels;
use crate::cuda::memory::Memory;

const SEED: u64 = 11;

/// Hashes of a counter.
struct Random(u64);

impl Random {
    fn between(&mut self, least: i64, most: i64) -> i64 {
        self.0 += 1;
        least + (xxh3_64_with_seed(&self.0.to_le_bytes(), SEED) % (most - least + 1) as u64) as i64
    }
}

/// The numbers −3 to 3 in each type.
fn encoded(numbers: &[i8], operands: Operands) -> Vec<u8> {
    const E4M3: [u8; 4] = [0x00, 0x38, 0x40, 0x44];
    let fp8 = |x: i8| E4M3[x.unsigned_abs() as usize] | if x < 0 { 0x80 } else { 0 };
    match operands {
        Operands::Int8 => numbers.iter().map(|&x| x as u8).collect(),
        Operands::Fp8 => numbers.iter().map(|&x| fp8(x)).collect(),
        Operands::Bf16 => numbers.iter().flat_map(|&x| bf16::from_f32(x.into()).to_le_bytes()).collect(),
    }
}

struct Case {
    shape: Shape,
    rows: usize,
    x: Vec<i8>,
    weights: Vec<i8>,
    row_scales: Vec<f32>,
    scales: Vec<f32>,
    bias: Vec<bf16>,
    before: Vec<bf16>,
}

impl Case {
    fn draw(random: &mut Random, shape: Shape, rows: usize) -> Self {
        let outputs = if shape.gated { 2 * shape.n } else { shape.n };
        let mut small = |count: usize| (0..count).map(|_| random.between(-3, 3) as i8).collect::<Vec<_>>();
        let (x, weights) = (small(rows * shape.k), small(outputs * shape.k));
        let numbers = |of: Vec<i8>| of.into_iter().map(|x| bf16::from_f32(x.into())).collect::<Vec<_>>();
        let (bias, before) = (numbers(small(shape.n)), numbers(small(rows * shape.n)));
        let mut scales =
            |count: usize| (0..count).map(|_| (random.between(-8, -5) as f32).exp2()).collect::<Vec<f32>>();
        let (row_scales, scales) = (scales(rows), scales(outputs));
        Self { shape, rows, x, weights, row_scales, scales, bias, before }
    }

    fn product(&self, row: usize, output: usize) -> f32 {
        let k = self.shape.k;
        let (x, w) = (&self.x[row * k..][..k], &self.weights[output * k..][..k]);
        let sum: i32 = x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        let scaled = self.shape.operands != Operands::Bf16;
        sum as f32 * if scaled { self.row_scales[row] * self.scales[output] } else { 1.0 }
    }

    fn expected(&self, row: usize, column: usize) -> f32 {
        let (shape, at) = (self.shape, row * self.shape.n + column);
        let of = |output| self.product(row, output);
        if shape.gated {
            let gate = of(column);
            return gate / (1.0 + (-gate).exp()) * of(shape.n + column);
        }
        let bias = if shape.bias { self.bias[column].to_f32() } else { 0.0 };
        of(column) + bias + if shape.add { self.before[at].to_f32() } else { 0.0 }
    }

    /// What the device makes of it, and whatever it wrote behind.
    fn run(&self, device: &Arc<Device>, stream: &Stream, wide: &Wide, variant: usize) -> Vec<bf16> {
        let upload = |bytes: &[u8]| {
            let memory = Memory::new(device, bytes.len().max(1), "a test").unwrap();
            stream.upload(memory.at, bytes).unwrap();
            memory
        };
        let operands = self.shape.operands;
        let (x, weights) = (upload(&encoded(&self.x, operands)), upload(&encoded(&self.weights, operands)));
        let (rows, columns) =
            (upload(bytemuck::cast_slice(&self.row_scales)), upload(bytemuck::cast_slice(&self.scales)));
        let bias = upload(bytemuck::cast_slice(&self.bias));
        let mut out = self.before.clone();
        out.extend(vec![bf16::from_f32(7.0); self.shape.n]);
        let on_device = upload(bytemuck::cast_slice(&out));
        let product = Product {
            weights: weights.at,
            x: x.at,
            rounded: (x.at, rows.at),
            out: on_device.at,
            bias: if self.shape.bias { bias.at } else { 0 },
            scales: columns.at,
        };
        wide.run(stream, variant, self.shape, self.rows, &product).unwrap();
        stream.synchronize().unwrap();
        stream.download(&mut out, on_device.at).unwrap();
        out
    }
}

fn check(case: &Case, got: &[bf16], what: &str) {
    let n = case.shape.n;
    for (at, got) in got[..case.rows * n].iter().enumerate() {
        let (got, want) = (got.to_f32(), case.expected(at / n, at % n));
        let bound = want.abs() / 128.0 + 1e-3;
        assert!((got - want).abs() <= bound, "{what}: row {} column {}: {got}, not {want}", at / n, at % n);
    }
    assert!(got[case.rows * n..].iter().all(|x| x.to_f32() == 7.0), "{what}: wrote behind its rows");
}

#[test]
fn products_of_many_rows_are_what_they_should_be() {
    let device = match Device::open(0) {
        Ok(device) if device.capability == (9, 0) => device,
        other => {
            let why = other.err().map_or("not Hopper".to_owned(), |error| error.to_string());
            assert!(std::env::var_os("TANDEM_REQUIRE_CUDA").is_none(), "{why}");
            eprintln!("skipped: {why}");
            return;
        }
    };
    let (stream, wide) = (Stream::new(&device).unwrap(), kernels::wide(&device).unwrap().unwrap());
    let mut random = Random(0);
    // One tile and its edges, several, more tiles than multiprocessors, k of one step and of a few and a part.
    for (rows, n, k) in [(1, 64, 64), (130, 328, 528), (300, 1000, 256), (1100, 2056, 144)] {
        for operands in [Operands::Int8, Operands::Fp8, Operands::Bf16] {
            for (bias, add, gated) in
                [(false, false, false), (true, false, false), (true, true, false), (false, false, true)]
            {
                let shape = Shape { n, k, operands, bias, add, wide: false, gated };
                if !wide.can(shape) {
                    assert!(!gated && operands != Operands::Int8, "{shape:?}");
                    continue;
                }
                let case = Case::draw(&mut random, shape, rows);
                for variant in wide.variants(shape) {
                    let got = case.run(&device, &stream, &wide, variant);
                    check(&case, &got, &format!("{rows} rows of {shape:?}, variant {variant}, seed {SEED}"));
                }
            }
        }
    }
}
