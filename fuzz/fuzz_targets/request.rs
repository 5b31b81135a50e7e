//! A chat request's JSON, in the types of the server's API: those are compiled here by themselves,
//! since the rest of the API needs the language model.
#![no_main]

use libfuzzer_sys::fuzz_target;
// What the types' file names.
use radapt::Error;

#[allow(dead_code)]
#[path = "../../src/server/api.rs"]
mod api;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<api::ChatRequest>(bytes) {
        for message in request.messages {
            if let Some(api::Content::Parts(parts)) = message.content {
                for part in parts {
                    if let api::Part::ImageUrl { image_url } = part {
                        let _ = image_url.url();
                    }
                }
            }
        }
    }
});
