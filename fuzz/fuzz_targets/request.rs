//! A chat request's JSON, in the types of the server's API: those are compiled here by themselves,
//! since the rest of the API needs the language model.
#![no_main]

use libfuzzer_sys::fuzz_target;
// What the types' file names.
use radapt::Error;

mod intake {
    pub use radapt::server::intake::{IntakeError, Refusal};
}

#[allow(dead_code)]
#[path = "../../src/server/api.rs"]
mod api;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<api::ChatRequest>(bytes) {
        let _ = api::refuse(&request.rest, "");
        let _ = request.harmless.check();
        let _ = api::Stop::texts(request.stop.as_ref());
    }
});
