//! The tables as text, and what is often said wrongly.

use std::fmt;

use engine::roofline::{Chunk, Work};

use super::{Intensity, Report, Settings, Transfer};

const GIGA: f64 = 1e9;

/// Figures that are often quoted, beside what they are here.
pub(super) fn notes(settings: &Settings, report: &Report) -> Vec<String> {
    let Settings { config, numbers, .. } = settings;
    let mut notes = Vec::new();
    let alone = Work::of(config, *numbers, &[Chunk::decode(0)]).intensity();
    notes.push(format!(
        "\"Decode does one operation per byte and sequence\" holds for bf16 weights alone (here {alone:.2}). Every sequence also reads its own \
         KV, {:.0} MB at {} tokens, so intensity does not grow with the batch for ever.",
        report.kv_bytes_per_token * settings.context as f64 / 1e6, settings.context
    ));
    let many = Work::of(config, *numbers, &vec![Chunk::decode(settings.context); 4096]).intensity();
    notes.push(match report.turns_at {
        [Some(alone), None] => format!(
            "\"A batch of {alone} makes decode bound by compute\": without context only. With {} tokens each, no batch does; the limit is about {many:.0} \
             operations per byte, below the balance point of {:.0}.",
            settings.context, report.balance
        ),
        [Some(alone), Some(with)] => format!(
            "Decode is bound by compute from a batch of {alone} without context, and of {with} with {} tokens each.",
            settings.context
        ),
        _ => "Decode is bound by memory at every batch.".to_owned(),
    });
    if settings.device.name == "h100" {
        notes.push(
            "The balance point of 295 is the data sheet's, 989 TFLOP/s over 3.35 TB/s. What plain kernels reach here, 761 over 3.09, balances at 246. \
             For int8 and fp8 products it is 591, not 295: halved bytes and doubled rates cancel out, so the batch stays the same."
                .to_owned(),
        );
    }
    if report.devices > 1 {
        notes.push(format!(
            "{:.0} GB of weights do not leave a fifth of one device's memory to KV: {} share them here, evenly and for nothing. Real ones exchange \
             activations twice a layer.",
            report.weight_bytes / GIGA, report.devices
        ));
    }
    if config.kv_heads < config.heads {
        let full = report.kv_bytes_per_token * config.group() as f64;
        notes.push(format!(
            "KV of one token is {:.0} KB because {} heads share {} of keys and values. Counting all heads gives {:.0} KB and transfers {} times as slow: \
             wrong for this network.",
            report.kv_bytes_per_token / 1e3, config.heads, config.kv_heads, full / 1e3, config.group()
        ));
    }
    notes
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match (&self.device.measured, self.reached) {
            (Some(measured), true) => measured.source,
            _ => self.device.source,
        };
        writeln!(f, "{} on {} × {}", self.shape, self.devices, self.device.title)?;
        writeln!(
            f,
            "{:.0} TFLOP/s, {:.2} TB/s, balance point {:.0} operations per byte ({source})",
            self.ceilings.flops_per_second / 1e12,
            self.ceilings.bytes_per_second / 1e12,
            self.balance
        )?;
        writeln!(
            f,
            "weights {:.1} GB, KV {:.1} KB a token",
            self.weight_bytes / GIGA,
            self.kv_bytes_per_token / 1e3
        )?;
        intensities(f, &self.intensity)?;
        self.decode_table(f)?;
        self.dtype_table(f)?;
        transfers(f, &self.transfers)?;
        writeln!(f)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "* {note}"))
    }
}

fn intensities(f: &mut fmt::Formatter<'_>, rows: &[Intensity]) -> fmt::Result {
    let mut phase = "";
    for row in rows.iter().filter(|row| row.flops > 0.0) {
        if row.phase != phase {
            phase = &row.phase;
            writeln!(
                f,
                "\n| {phase} | GFLOP | GB of weights and KV | FLOP per byte | with activations | bound by |"
            )?;
            writeln!(f, "|---|---|---|---|---|---|")?;
        }
        let (flops, bytes) = (row.flops / GIGA, row.bytes / GIGA);
        write!(f, "| {} | {flops:.1} | {bytes:.3} | {:.1} ", row.part, row.intensity)?;
        writeln!(f, "| {:.1} | {} |", row.with_activations, row.bound)?;
    }
    Ok(())
}

fn transfers(f: &mut fmt::Formatter<'_>, rows: &[Transfer]) -> fmt::Result {
    let Some(first) = rows.first().filter(|row| !row.over.is_empty()) else { return Ok(()) };
    write!(f, "\n| prompt | KV MB | prefill floor ms |")?;
    first.over.iter().try_for_each(|over| write!(f, " {} |", over.link))?;
    writeln!(f, "\n|---|---|---|{}", "---|".repeat(first.over.len()))?;
    for row in rows {
        write!(f, "| {} | {:.1} | {:.1} |", row.tokens, row.bytes / 1e6, row.prefill_ms)?;
        row.over.iter().try_for_each(|over| write!(f, " {:.2} ({:.2}) |", over.ms, over.exposed_ms))?;
        writeln!(f)?;
    }
    writeln!(
        f,
        "ms for all of it at 80 % of the line rate (in brackets: left after prefill when each layer is pushed as it is done)"
    )
}

impl Report {
    fn decode_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n| decode, context {} | FLOP per byte | floor ms | tokens/s | KV of the bytes | bound by | |",
            self.context
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for row in &self.decode {
            let fits = if row.fits { "" } else { "does not fit" };
            writeln!(
                f,
                "| batch {} | {:.1} | {:.2} | {:.0} | {:.0} % | {} | {fits} |",
                row.batch,
                row.intensity,
                row.floor_ms,
                row.tokens_per_second,
                row.kv_share * 100.0,
                row.bound
            )?;
        }
        Ok(())
    }

    fn dtype_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n| weights / KV | GB of weights | prefill {} ms | decode batch 1 ms | batch 128 ms |",
            self.prompt
        )?;
        writeln!(f, "|---|---|---|---|---|")?;
        for row in &self.dtypes {
            write!(f, "| {} / {} | {:.1} ", row.weights.name(), row.kv.name(), row.weight_bytes / GIGA)?;
            write!(f, "| {:.1} (× {:.2}) ", row.prefill_ms, row.prefill_gain)?;
            writeln!(
                f,
                "| {:.2} (× {:.2}) | {:.2} (× {:.2}) |",
                row.decode_ms[0], row.decode_gain[0], row.decode_ms[1], row.decode_gain[1]
            )?;
        }
        Ok(())
    }
}
