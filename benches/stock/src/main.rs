//! Stock mistral.rs 0.8.1 as a server: its own router and its own engine, on one model folder.
//!
//! `stock FOLDER [--prefix-cache N] [--max-seqs N]` prints `http://ADDRESS` when it listens.

use anyhow::{Context, bail};
use axum::serve::ListenerExt;
use gemm as _;
use mistralrs_core::{AutoDeviceMapParams, ModelDType, ModelSelected};
use mistralrs_server_core::mistralrs_for_server_builder::MistralRsForServerBuilder;
use mistralrs_server_core::mistralrs_server_router_builder::MistralRsServerRouterBuilder;

struct Options {
    folder: String,
    prefix_cache: usize,
    max_seqs: usize,
}

fn options() -> anyhow::Result<Options> {
    let mut found = Options { folder: String::new(), prefix_cache: 16, max_seqs: 16 };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> anyhow::Result<usize> {
            let value = words.next().with_context(|| format!("{word}: expected a number"))?;
            value.parse().with_context(|| format!("{word}: expected a number, found `{value}`"))
        };
        match word.as_str() {
            "--prefix-cache" => found.prefix_cache = number()?,
            "--max-seqs" => found.max_seqs = number()?,
            flag if flag.starts_with('-') => bail!("no flag `{flag}`"),
            _ => found.folder = word,
        }
    }
    if found.folder.is_empty() {
        bail!("expected a model folder");
    }
    Ok(found)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let options = options()?;
    let model = ModelSelected::MultimodalPlain {
        model_id: options.folder,
        tokenizer_json: None,
        arch: None,
        dtype: ModelDType::F32,
        topology: None,
        write_uqff: None,
        from_uqff: None,
        max_edge: None,
        calibration_file: None,
        imatrix: None,
        max_seq_len: AutoDeviceMapParams::DEFAULT_MAX_SEQ_LEN,
        max_batch_size: AutoDeviceMapParams::DEFAULT_MAX_BATCH_SIZE,
        max_num_images: AutoDeviceMapParams::DEFAULT_MAX_NUM_IMAGES,
        max_image_length: AutoDeviceMapParams::DEFAULT_MAX_IMAGE_LENGTH,
        hf_cache_path: None,
        matformer_config_path: None,
        matformer_slice_name: None,
        organization: None,
    };
    let engine = MistralRsForServerBuilder::new()
        .with_model(model)
        .with_cpu(true)
        .with_max_seqs(options.max_seqs)
        .with_prefix_cache_n(options.prefix_cache)
        .build()
        .await?;
    let router = MistralRsServerRouterBuilder::new().with_mistralrs(engine).build().await?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("http://{}", listener.local_addr()?);
    // Not upstream's: without it each streamed answer's second piece waits 40 ms for a late ACK.
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    axum::serve(listener, router).await?;
    Ok(())
}
