//! A picture's bytes, through the server's intake: anything may come out but a panic, and no more
//! memory than the limits allow (libFuzzer's own limit is above them).
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use radapt::image::{DecodeLimits, decode, measure};
use radapt::server::intake::{Intake, IntakeOptions};
use tokio::runtime::{Builder, Runtime};

const LIMITS: DecodeLimits = DecodeLimits { max_bytes: 1 << 20, max_pixels: 1 << 20, max_memory: 16 << 20 };

static INTAKE: LazyLock<(Runtime, Intake)> = LazyLock::new(|| {
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let options = IntakeOptions { limits: LIMITS, memory: 64 << 20, ..Default::default() };
    (runtime, Intake::new(options).unwrap())
});

fuzz_target!(|bytes: &[u8]| {
    let header = measure(bytes, "fuzz", &LIMITS);
    let decoded = decode(bytes, "fuzz", &LIMITS);
    if let Ok(picture) = &decoded {
        let header = header.expect("what can be decoded can be measured");
        let turned = (header.height, header.width);
        assert!(picture.dimensions() == (header.width, header.height) || picture.dimensions() == turned);
        // What was measured is enough to decode it with.
        let exact = DecodeLimits { max_memory: header.memory.min(LIMITS.max_memory), ..LIMITS };
        decode(bytes, "fuzz", &exact).expect("the memory that was measured is enough");
    }
    // The pool hands over what decoding gives. One in sixteen: it takes another thread.
    if bytes.len() % 16 == 0 {
        let (runtime, intake) = &*INTAKE;
        let taken = runtime.block_on(intake.picture_from_bytes(bytes.to_vec(), "fuzz"));
        assert_eq!(taken.ok(), decoded.ok());
    }
});
