//! A checkpoint: safetensors' header, or PyTorch's zip and pickle.
#![no_main]

mod scratch;

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use radapt::tower::weights::{Checkpoint, Weights};

fuzz_target!(|bytes: &[u8]| {
    let Ok(checkpoint) = Checkpoint::open(scratch::file(bytes)) else { return };
    let whole = checkpoint.at("", &Device::Cpu);
    for name in checkpoint.names().iter().take(8) {
        if let Some(shape) = checkpoint.shape(name) {
            let _ = whole.get(name, &shape);
        }
    }
});
