//! `quantization_config` of config.json: checkpoints that compressed-tensors wrote (llm-compressor, vLLM's models).
//!
//! Read are its W8A8 schemes: weights in int8 or e4m3 with a scale per output (or one per matrix), activations per token in every
//! step, symmetric. Everything else is refused by name: a scheme that is half understood gives wrong answers.

use serde::Deserialize;
use serde_json::Value;

use super::quantise::Quantisation;

#[derive(Debug, Deserialize)]
struct RawScheme {
    quant_method: Option<String>,
    format: Option<String>,
    #[serde(default)]
    config_groups: std::collections::BTreeMap<String, RawGroup>,
    #[serde(default)]
    ignore: Vec<String>,
    kv_cache_scheme: Option<Value>,
    sparsity_config: Option<RawSparsity>,
    transform_config: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct RawSparsity {
    format: Option<String>,
}

#[derive(Debug, Deserialize)]
struct RawGroup {
    #[serde(default)]
    targets: Vec<String>,
    format: Option<String>,
    weights: Option<RawNumbers>,
    input_activations: Option<RawNumbers>,
    output_activations: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct RawNumbers {
    num_bits: u64,
    #[serde(rename = "type", default = "int")]
    kind: String,
    #[serde(default = "yes")]
    symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    block_structure: Option<Value>,
    #[serde(default)]
    dynamic: Value,
    actorder: Option<Value>,
}

fn int() -> String {
    "int".into()
}

fn yes() -> bool {
    true
}

/// The kind of numbers that a `quantization_config` describes; otherwise what of it is not known.
pub(super) fn kind(config: &Value) -> Result<Quantisation, String> {
    let say = |reason: String| format!("quantization_config: {reason}");
    let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("(none)");
    if method != "compressed-tensors" {
        return Err(say(format!(
            "quant_method {method} is not read, only compressed-tensors in W8A8; use the bf16 checkpoint"
        )));
    }
    let raw: RawScheme =
        serde_json::from_value(config.clone()).map_err(|e| say(format!("not understood: {e}")))?;
    scheme(&raw).map_err(say)
}

fn scheme(raw: &RawScheme) -> Result<Quantisation, String> {
    debug_assert_eq!(raw.quant_method.as_deref(), Some("compressed-tensors"));
    let wanted = match raw.format.as_deref() {
        Some("int-quantized") => Quantisation::Int8,
        Some("float-quantized") => Quantisation::Fp8,
        other => {
            let other = other.unwrap_or("(none)");
            return Err(format!("format {other} is not read, only int-quantized and float-quantized"));
        }
    };
    absent("kv_cache_scheme", raw.kv_cache_scheme.as_ref())?;
    absent(
        "transform_config",
        raw.transform_config.as_ref().filter(|t| t.as_object().is_none_or(|o| !o.is_empty())),
    )?;
    if let Some(format) =
        raw.sparsity_config.as_ref().and_then(|s| s.format.as_deref()).filter(|f| *f != "dense")
    {
        return Err(format!("sparsity_config.format {format} is not read, only dense"));
    }
    if let Some(module) = raw.ignore.iter().find(|m| !m.contains("lm_head") && !m.contains("embed_tokens")) {
        return Err(format!("ignore names {module}: only networks whose layers are all quantised are read"));
    }
    let mut groups = raw.config_groups.iter();
    let (Some((name, group)), None) = (groups.next(), groups.next()) else {
        return Err(format!("{} config_groups, exactly one is read", raw.config_groups.len()));
    };
    one_group(group, wanted).map_err(|reason| format!("config_groups.{name}.{reason}"))?;
    Ok(wanted)
}

fn one_group(group: &RawGroup, wanted: Quantisation) -> Result<(), String> {
    if group.targets != ["Linear"] {
        return Err(format!("targets {:?}, only [\"Linear\"] is read", group.targets));
    }
    if let Some(format) =
        group.format.as_deref().filter(|f| !matches!(*f, "int-quantized" | "float-quantized"))
    {
        return Err(format!("format {format} is not read"));
    }
    absent("output_activations", group.output_activations.as_ref())?;
    let weights = group.weights.as_ref().ok_or("weights is missing")?;
    let activations = group
        .input_activations
        .as_ref()
        .ok_or("input_activations is missing: weight-only schemes (W8A16, W4A16) are not read, only W8A8")?;
    numbers(weights, wanted, &["channel", "tensor"], false).map_err(|reason| format!("weights.{reason}"))?;
    numbers(activations, wanted, &["token"], true).map_err(|reason| format!("input_activations.{reason}"))
}

fn numbers(raw: &RawNumbers, wanted: Quantisation, strategies: &[&str], dynamic: bool) -> Result<(), String> {
    let kind = if wanted == Quantisation::Int8 { "int" } else { "float" };
    if raw.num_bits != 8 || raw.kind != kind {
        return Err(format!(
            "num_bits {} of type {}, only 8 of type {kind} are read here",
            raw.num_bits, raw.kind
        ));
    }
    if !raw.symmetric {
        return Err("symmetric is false: zero points are not read".into());
    }
    if raw.group_size.is_some_and(|size| size > 0) {
        return Err("group_size is set: only one scale per output is read".into());
    }
    absent("block_structure", raw.block_structure.as_ref())?;
    absent("actorder", raw.actorder.as_ref().filter(|order| order.as_bool() != Some(false)))?;
    let strategy = raw.strategy.as_deref().unwrap_or("(none)");
    if !strategies.contains(&strategy) {
        return Err(format!("strategy {strategy} is not read, only {}", strategies.join(" and ")));
    }
    if raw.dynamic.as_bool().unwrap_or(false) != dynamic || raw.dynamic.is_string() {
        let should = if dynamic { "true: fixed activation scales are not read" } else { "false" };
        return Err(format!("dynamic is {}, must be {should}", raw.dynamic));
    }
    Ok(())
}

fn absent(field: &str, value: Option<&Value>) -> Result<(), String> {
    match value.filter(|value| !value.is_null()) {
        Some(_) => Err(format!("{field} is set, which is not read")),
        None => Ok(()),
    }
}
