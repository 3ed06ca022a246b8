//! Our kernels for products against sums made here, of numbers that are exact in each type. Needs a GPU.

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
    /// Weights of a norm of x, if there is one.
    norm: Option<Vec<f32>>,
    before: Vec<bf16>,
}

const EPS: f32 = 0.5;

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
        Self { shape, rows, x, weights, row_scales, scales, bias, norm: None, before }
    }

    fn normed(mut self, random: &mut Random) -> Self {
        self.norm = Some((0..self.shape.k).map(|_| (random.between(-1, 1) as f32).exp2()).collect());
        self
    }

    /// Scales of rows are of x in eight bits.
    fn product(&self, row: usize, output: usize, rounded: bool) -> f32 {
        let k = self.shape.k;
        let (x, w) = (&self.x[row * k..][..k], &self.weights[output * k..][..k]);
        if let Some(norm) = &self.norm {
            let squares: i32 = x.iter().map(|&x| i32::from(x).pow(2)).sum();
            let scale = (squares as f32 / k as f32 + EPS).sqrt().recip();
            let sum = x.iter().zip(w).zip(norm).map(|((&x, &w), norm)| f32::from(x) * f32::from(w) * norm);
            let of_row = if self.shape.operands == Operands::Bf16 { 1.0 } else { self.scales[output] };
            return sum.sum::<f32>() * scale * of_row;
        }
        let sum: i32 = x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
        match self.shape.operands {
            Operands::Bf16 => sum as f32,
            _ if rounded => sum as f32 * (self.row_scales[row] * self.scales[output]),
            _ => sum as f32 * self.scales[output],
        }
    }

    fn expected(&self, row: usize, column: usize, rounded: bool) -> f32 {
        let (shape, at) = (self.shape, row * self.shape.n + column);
        let of = |output| self.product(row, output, rounded);
        if shape.gated {
            let gate = of(column);
            return gate / (1.0 + (-gate).exp()) * of(shape.n + column);
        }
        let bias = if shape.bias { self.bias[column].to_f32() } else { 0.0 };
        of(column) + bias + if shape.add { self.before[at].to_f32() } else { 0.0 }
    }

    /// What the device makes of it, and whatever it wrote behind.
    fn run(
        &self,
        device: &Arc<Device>,
        stream: &Stream,
        kernel: impl Fn(&Product) -> Result<(), EngineError>,
    ) -> Vec<f32> {
        let upload = |bytes: &[u8]| {
            let memory = Memory::new(device, bytes.len().max(1), "a test").unwrap();
            stream.upload(memory.at, bytes).unwrap();
            memory
        };
        let operands = self.shape.operands;
        let (x, weights) =
            (upload(&encoded(&self.x, Operands::Bf16)), upload(&encoded(&self.weights, operands)));
        let rounded = upload(&encoded(&self.x, operands));
        let (rows, columns) =
            (upload(bytemuck::cast_slice(&self.row_scales)), upload(bytemuck::cast_slice(&self.scales)));
        let bias = upload(bytemuck::cast_slice(&self.bias));
        let norm: Vec<bf16> = self.norm.iter().flatten().map(|&x| bf16::from_f32(x)).collect();
        let norm = upload(bytemuck::cast_slice(&norm));
        let mut out = self.before.clone();
        out.extend(vec![bf16::from_f32(7.0); self.shape.n]);
        let mut wide: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
        let bytes = if self.shape.wide { bytemuck::cast_slice(&wide) } else { bytemuck::cast_slice(&out) };
        let on_device = upload(bytes);
        let product = Product {
            weights: weights.at,
            x: x.at,
            norm: (if self.norm.is_some() { norm.at } else { 0 }, EPS),
            rounded: (rounded.at, rows.at),
            out: on_device.at,
            bias: if self.shape.bias { bias.at } else { 0 },
            scales: columns.at,
        };
        kernel(&product).unwrap();
        stream.synchronize().unwrap();
        if self.shape.wide {
            stream.download(&mut wide, on_device.at).unwrap();
            return wide;
        }
        stream.download(&mut out, on_device.at).unwrap();
        out.iter().map(|x| x.to_f32()).collect()
    }
}

fn check(case: &Case, got: &[f32], rounded: bool, what: &str) {
    let n = case.shape.n;
    for (at, got) in got[..case.rows * n].iter().enumerate() {
        let want = case.expected(at / n, at % n, rounded);
        let bound = want.abs() / 128.0 + 1e-3;
        assert!((got - want).abs() <= bound, "{what}: row {} column {}: {got}, not {want}", at / n, at % n);
    }
    assert!(got[case.rows * n..].iter().all(|&x| x == 7.0), "{what}: wrote behind its rows");
}

/// The device, if it is one that all of the kernels are for.
fn hopper() -> Option<Arc<Device>> {
    match Device::open(0) {
        Ok(device) if device.capability == (9, 0) => Some(device),
        other => {
            let why = other.err().map_or("not Hopper".to_owned(), |error| error.to_string());
            assert!(std::env::var_os("TANDEM_REQUIRE_CUDA").is_none(), "{why}");
            eprintln!("skipped: {why}");
            None
        }
    }
}

const OPERANDS: [Operands; 3] = [Operands::Int8, Operands::Fp8, Operands::Bf16];
/// Bias, adding, gated.
const FORMS: [(bool, bool, bool); 4] =
    [(false, false, false), (true, false, false), (true, true, false), (false, false, true)];

#[test]
fn products_of_many_rows_are_what_they_should_be() {
    let Some(device) = hopper() else { return };
    let (stream, wide) = (Stream::new(&device).unwrap(), kernels::wide(&device).unwrap().unwrap());
    let mut random = Random(0);
    // One tile and its edges, several, more tiles than multiprocessors, k of one step and of a few and a part.
    for (rows, n, k) in [(1, 64, 64), (130, 328, 528), (300, 1000, 256), (1100, 2056, 144)] {
        for (operands, (bias, add, gated)) in OPERANDS.iter().flat_map(|&o| FORMS.map(|form| (o, form))) {
            let shape = Shape { n, k, operands, bias, add, wide: false, gated };
            if !wide.can(shape) {
                assert!(!gated && operands != Operands::Int8, "{shape:?}");
                continue;
            }
            let case = Case::draw(&mut random, shape, rows);
            for variant in wide.variants(shape) {
                let got =
                    case.run(&device, &stream, |product| wide.run(&stream, variant, shape, rows, product));
                let what = format!("{rows} rows of {shape:?}, variant {variant}, seed {SEED}");
                check(&case, &got, true, &what);
            }
        }
    }
}

#[test]
fn products_of_few_rows_are_what_they_should_be() {
    let Some(device) = hopper() else { return };
    let (stream, thin) = (Stream::new(&device).unwrap(), kernels::thin(&device).unwrap());
    let mut random = Random(0);
    // Fewer rows of weights than a block takes, blocks that are not full, blocks that take tile after tile; k of less than a turn of
    // all warps, and of some.
    let all = [1, 7, 8, 9, 16, 30, 32];
    for (n, k, numbers) in [
        (8, 64, &all[..]),
        (72, 576, &all),
        (328, 4096, &all),
        (9_000, 192, &[1, 9, 30]),
        (9_000, 1088, &[8, 16]),
    ] {
        for (operands, (bias, add, gated)) in OPERANDS.iter().flat_map(|&o| FORMS.map(|form| (o, form))) {
            for (rows, wide) in numbers.iter().flat_map(|&rows| [(rows, false), (rows, true)]) {
                let shape = Shape { n, k, operands, bias, add, wide, gated };
                if wide && (gated || !thin.can(shape, rows)) {
                    continue;
                }
                let case = Case::draw(&mut random, shape, rows);
                let case = if random.between(0, 1) == 1 { case.normed(&mut random) } else { case };
                let got = case.run(&device, &stream, |product| thin.run(&stream, shape, rows, product));
                let normed = case.norm.is_some();
                check(&case, &got, false, &format!("{rows} rows of {shape:?}, normed {normed}, seed {SEED}"));
            }
        }
    }
}
