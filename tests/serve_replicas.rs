//! Three replicas behind the load balancer of `examples/serve`, restarted one by one and one of them killed, under load.
#![cfg(all(target_os = "linux", feature = "engine"))]

use std::path::Path;
use std::process::Command;

#[test]
fn replicas_are_restarted_without_a_loss() {
    let output = Command::new("python3")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve_replicas.py"))
        .arg(env!("CARGO_BIN_EXE_radapt"))
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            println!("SKIPPED replicas_are_restarted_without_a_loss: python3: {error}");
            return;
        }
    };
    let (said, erred) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // Without Debian's haproxy a line that begins with SKIPPED.
    println!("{said}");
    assert!(output.status.success(), "{said}\n{erred}");
}
