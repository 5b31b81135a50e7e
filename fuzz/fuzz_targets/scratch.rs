//! The file a target's input is put into, in memory where the system has such a folder.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    folder.join(format!("radapt-fuzz-{}", std::process::id()))
});

pub fn file(bytes: &[u8]) -> &'static Path {
    std::fs::write(&*FILE, bytes).expect("the folder takes files");
    &FILE
}
