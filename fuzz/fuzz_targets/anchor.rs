//! An anchor file.
#![no_main]

mod scratch;

use libfuzzer_sys::fuzz_target;
use radapt::defense::Anchor;

fuzz_target!(|bytes: &[u8]| {
    let path = scratch::file(bytes);
    if let Ok(anchor) = Anchor::load(path) {
        // What was read can be written, and is the same when read again.
        let copy = path.with_extension("copy");
        anchor.save(&copy).expect("a whole anchor can be written");
        let again = Anchor::load(&copy).expect("what was written can be read");
        assert_eq!(anchor.meta.entries(), again.meta.entries());
        assert_eq!(anchor.sha256().unwrap(), again.sha256().unwrap());
    }
});
