//! `examples/slurm/` under a real Slurm of one node, which the test starts and stops: three shards, one killed and
//! requeued, merged to the same bytes as a run in one piece.
#![cfg(target_os = "linux")]

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

/// What Debian's `slurm-wlm` and `munge` bring; the daemons lie outside a user's path.
fn missing() -> Option<&'static str> {
    let folders = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];
    let found = |name: &&str| folders.iter().any(|folder| Path::new(folder).join(name).is_file());
    ["munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol"].into_iter().find(|name| !found(name))
}

#[test]
fn three_shards_of_which_one_is_killed() {
    if let Some(program) = missing() {
        println!(
            "SKIPPED three_shards_of_which_one_is_killed: `{program}` is not installed (slurm-wlm, munge)"
        );
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    // Both are held until both are chosen.
    let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    let [controller, node] = ports.map(|port| port.local_addr().expect("an address").port().to_string());
    let output = Command::new("bash")
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/slurm/three_shards.sh"))
        .arg(env!("CARGO_BIN_EXE_radapt"))
        .arg(folder.path().join("slurm"))
        .args([controller, node])
        .env_remove("RADAPT_MODEL")
        .output()
        .expect("bash");
    let (said, erred) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}\n{erred}");
    assert!(said.contains("killed by signal 9, back into the queue"), "{said}");
    assert!(said.contains("shard 2/3 on ") && said.contains(", start 2"), "{said}");
    assert!(said.trim_end().ends_with("merged: equal to the single run byte for byte"), "{said}");
}
