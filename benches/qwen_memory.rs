//! What Qwen3-VL-8B's tower costs in memory and time under chat: mistral.rs' own, ours, ours defended.
//!
//!     cargo bench --bench qwen_memory [-- --pairs 3] [-- --side 448]
//!
//! A model folder with Qwen3-VL-8B's vision configuration and random weights in bf16, and a language
//! model of one layer. Each case is a process of its own that loads it in f32 and answers one question
//! about one picture; the three alternate. One JSON object per line on stdout.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use radapt::defense::{AnchorChoice, DefenseOptions};
use radapt::engine::{Engine, EngineOptions, Sampling, Turn};
use radapt::model::{Lookup, Model};
use serde_json::{Value, json};

const CASES: [&str; 3] = ["upstream", "ours", "defended"];
const WIDTH: usize = 4096;
const INNER: usize = 256;

fn flag(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

fn random(shape: &[usize], state: &mut u64) -> candle_core::Result<Tensor> {
    let spread = match shape {
        [_] => 0.1,
        [_, inner @ ..] => (3.0 / inner.iter().product::<usize>() as f32).sqrt(),
        [] => 1.0,
    };
    let values: Vec<half::bf16> = (0..shape.iter().product::<usize>())
        .map(|_| {
            // xorshift: many numbers, of which nobody asks much.
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            half::bf16::from_f32(spread * ((*state >> 40) as f32 / (1u64 << 23) as f32 - 1.0))
        })
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// The model's files, the small ones from the fixture of the tiny Qwen3-VL.
fn write_model(folder: &Path) -> anyhow::Result<()> {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen_chat/qwen3_vl");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(tiny.join(name), folder.join(name)).with_context(|| name.to_string())?;
    }
    let text = std::fs::read_to_string(tiny.join("config.json"))?;
    let mut config: Value = serde_json::from_str(&text)?;
    config["vision_config"] = json!({ "model_type": "qwen3_vl", "out_hidden_size": WIDTH });
    let parts = &mut config["text_config"];
    for (key, value) in [
        ("hidden_size", WIDTH),
        ("intermediate_size", INNER),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 32),
        ("num_key_value_heads", 8),
        ("head_dim", 128),
        ("max_position_embeddings", 32768),
    ] {
        parts[key] = json!(value);
    }
    if let Some(fields) = parts.as_object_mut() {
        fields.remove("rope_parameters");
        fields.insert("rope_theta".into(), json!(5e6));
        fields
            .insert("rope_scaling".into(), json!({ "rope_type": "default", "mrope_section": [24, 20, 20] }));
    }
    let vocabulary = parts["vocab_size"].as_u64().context("vocab_size")? as usize;
    let tied = config["tie_word_embeddings"] == json!(true);
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let preprocessor = json!({
        "size": { "shortest_edge": 3136, "longest_edge": 16_777_216 }, "patch_size": 16, "merge_size": 2,
        "temporal_patch_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    });
    std::fs::write(folder.join("preprocessor_config.json"), preprocessor.to_string())?;

    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.visual.patch_embed.proj.weight".into(), vec![1152, 3, 2, 16, 16]),
        ("model.visual.patch_embed.proj.bias".into(), vec![1152]),
        ("model.visual.pos_embed.weight".into(), vec![2304, 1152]),
    ];
    let both = |shapes: &mut Vec<(String, Vec<usize>)>, name: String, rows: usize, columns: usize| {
        let weight = if columns == 0 { vec![rows] } else { vec![rows, columns] };
        shapes.push((format!("{name}.weight"), weight));
        shapes.push((format!("{name}.bias"), vec![rows]));
    };
    for i in 0..27 {
        let at = |part: &str| format!("model.visual.blocks.{i}.{part}");
        both(&mut shapes, at("norm1"), 1152, 0);
        both(&mut shapes, at("norm2"), 1152, 0);
        both(&mut shapes, at("attn.qkv"), 3 * 1152, 1152);
        both(&mut shapes, at("attn.proj"), 1152, 1152);
        both(&mut shapes, at("mlp.linear_fc1"), 4304, 1152);
        both(&mut shapes, at("mlp.linear_fc2"), 1152, 4304);
    }
    let lists = (0..3).map(|i| format!("model.visual.deepstack_merger_list.{i}"));
    for (name, norm) in
        std::iter::once(("model.visual.merger".to_string(), 1152)).chain(lists.map(|n| (n, 4608)))
    {
        both(&mut shapes, format!("{name}.norm"), norm, 0);
        both(&mut shapes, format!("{name}.linear_fc1"), 4608, 4608);
        both(&mut shapes, format!("{name}.linear_fc2"), WIDTH, 4608);
    }
    let root = "model.language_model";
    shapes.push((format!("{root}.embed_tokens.weight"), vec![vocabulary, WIDTH]));
    shapes.push((format!("{root}.norm.weight"), vec![WIDTH]));
    if !tied {
        shapes.push(("lm_head.weight".into(), vec![vocabulary, WIDTH]));
    }
    for layer in 0..3 {
        let at = |part: &str| format!("{root}.layers.{layer}.{part}.weight");
        for (part, shape) in [
            ("input_layernorm", vec![WIDTH]),
            ("post_attention_layernorm", vec![WIDTH]),
            ("self_attn.q_proj", vec![4096, WIDTH]),
            ("self_attn.k_proj", vec![1024, WIDTH]),
            ("self_attn.v_proj", vec![1024, WIDTH]),
            ("self_attn.o_proj", vec![WIDTH, 4096]),
            ("self_attn.q_norm", vec![128]),
            ("self_attn.k_norm", vec![128]),
            ("mlp.gate_proj", vec![INNER, WIDTH]),
            ("mlp.up_proj", vec![INNER, WIDTH]),
            ("mlp.down_proj", vec![WIDTH, INNER]),
        ] {
            shapes.push((at(part), shape));
        }
    }
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut tensors = HashMap::new();
    for (name, shape) in shapes {
        tensors.insert(name, random(&shape, &mut state)?);
    }
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
    Ok(())
}

fn peak_mb() -> anyhow::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? / 1024.0)
}

fn case(name: &str, folder: &str, side: u32) -> anyhow::Result<()> {
    let anchor = if name == "defended" { AnchorChoice::TrainingFree } else { AnchorChoice::None };
    let options = EngineOptions {
        upstream_tower: name == "upstream",
        defense: DefenseOptions { anchor, ..DefenseOptions::default() },
        dtype: Some(DType::F32),
        ..EngineOptions::new(Device::Cpu)
    };
    let picture =
        RgbImage::from_fn(side, side, |x, y| image::Rgb([(x * 7) as u8, (y * 5) as u8, (x * y) as u8]));
    let turn = Turn::of_pictures("what is it ?", vec![picture]);
    let sampling = Sampling { max_tokens: 1, ..Sampling::default() };
    let runtime = tokio::runtime::Runtime::new()?;
    let (loaded, seconds) = runtime.block_on(async {
        let start = Instant::now();
        let engine = Engine::load(Model::find(folder, &Lookup::default())?, options).await?;
        let loaded = start.elapsed().as_secs_f64();
        let start = Instant::now();
        engine.answer(&[turn], &sampling).await?;
        anyhow::Ok((loaded, start.elapsed().as_secs_f64()))
    })?;
    println!("{}", json!({ "case": name, "load_s": loaded, "answer_s": seconds, "peak_rss_mb": peak_mb()? }));
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let side = flag("--side").map_or(Ok(448), |side| side.parse())?;
    if let (Some(name), Some(folder)) = (flag("--case"), flag("--folder")) {
        return case(&name, &folder, side);
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        eprintln!("nothing is measured without --bench");
        return Ok(());
    }
    let pairs: usize = flag("--pairs").map_or(Ok(3), |pairs| pairs.parse())?;
    let folder = tempfile::tempdir()?;
    write_model(folder.path())?;
    let mut found: HashMap<&str, Vec<(f64, f64)>> = HashMap::new();
    for _ in 0..pairs {
        for name in CASES {
            let output = Command::new(std::env::current_exe()?)
                .args(["--case", name, "--side", &side.to_string(), "--folder"])
                .arg(folder.path())
                .output()?;
            if !output.status.success() {
                bail!("{name}: {}", String::from_utf8_lossy(&output.stderr));
            }
            let row: Value = serde_json::from_slice(&output.stdout)?;
            println!("{row}");
            let number = |key: &str| row[key].as_f64().with_context(|| key.to_string());
            found.entry(name).or_default().push((number("answer_s")?, number("peak_rss_mb")?));
        }
    }
    let ratios = |a: &str, b: &str, of: fn(&(f64, f64)) -> f64| -> Vec<f64> {
        found[a].iter().zip(&found[b]).map(|(a, b)| of(a) / of(b)).collect()
    };
    for (name, a, b) in
        [("ours over mistral.rs' own", "ours", "upstream"), ("defended over ours", "defended", "ours")]
    {
        println!(
            "{}",
            json!({ "ratio": name, "side": side, "time": ratios(a, b, |x| x.0), "peak": ratios(a, b, |x| x.1) })
        );
    }
    Ok(())
}
