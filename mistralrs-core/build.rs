//! Takes the published mistralrs-core 0.8.1, checks it against a pinned SHA-256, unpacks it into
//! `OUT_DIR` and applies `patches/`. `src/lib.rs` includes the result.
//!
//! Where the package comes from, first hit wins:
//! 1. `RADAPT_MISTRALRS_CORE_CRATE`: path of a `mistralrs-core-0.8.1.crate` file (for vendored or
//!    air-gapped builds);
//! 2. the cargo cache (`$CARGO_HOME/registry/cache/*/`);
//! 3. `cargo fetch` of a throw-away package that depends on it, which fills that cache.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use sha2::{Digest, Sha256};

const NAME: &str = "mistralrs-core-0.8.1";
const SHA256: &str = "a2b8b9e5c94491d9ceeded3a30291cb6af6ae74810a5776dd55e3bbb8b3429d4";
const CRATE_ENV: &str = "RADAPT_MISTRALRS_CORE_CRATE";

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=patches");
    println!("cargo:rerun-if-env-changed={CRATE_ENV}");
    println!("cargo:rustc-env=MISTRALRS_GIT_REVISION=0.8.1+radapt");
    if let Err(message) = run() {
        // A build script reports failure by panicking or exiting; exiting keeps it to one line.
        eprintln!("mistralrs-core overlay: {message}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    let archive = locate(&out)?;
    let source = unpack(&archive, &out)?;
    patch(&source)?;
    #[cfg(feature = "cuda")]
    cuda_kernels(&source, &out)?;
    Ok(())
}

/// The bytes of the published package, verified.
fn locate(out: &Path) -> Result<Vec<u8>> {
    if let Some(path) = env::var_os(CRATE_ENV) {
        let path = PathBuf::from(path);
        println!("cargo:rerun-if-changed={}", path.display());
        let bytes =
            fs::read(&path).map_err(|e| format!("cannot read {CRATE_ENV} `{}`: {e}", path.display()))?;
        verify(&bytes).map_err(|found| {
            format!("{CRATE_ENV} `{}` has SHA-256 {found}, expected {SHA256}", path.display())
        })?;
        return Ok(bytes);
    }
    let cargo_home = cargo_home()?;
    if let Some(bytes) = in_cache(&cargo_home) {
        return Ok(bytes);
    }
    fetch(out)?;
    in_cache(&cargo_home).ok_or_else(|| {
        format!(
            "`{NAME}.crate` with SHA-256 {SHA256} is not in `{}` after `cargo fetch`; \
             download it from the registry and set {CRATE_ENV} to its path",
            cargo_home.join("registry/cache").display()
        )
    })
}

fn verify(bytes: &[u8]) -> std::result::Result<(), String> {
    let found: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    if found == SHA256 {
        Ok(())
    } else {
        Err(found)
    }
}

fn cargo_home() -> Result<PathBuf> {
    // cargo sets CARGO_HOME for build scripts only when the user did.
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(PathBuf::from(home));
    }
    let home = env::var_os("HOME").or_else(|| env::var_os("USERPROFILE"));
    home.map(|h| PathBuf::from(h).join(".cargo"))
        .ok_or_else(|| format!("neither CARGO_HOME nor HOME is set; set {CRATE_ENV}"))
}

/// Any registry's copy will do, as long as the checksum is right.
fn in_cache(cargo_home: &Path) -> Option<Vec<u8>> {
    let registries = fs::read_dir(cargo_home.join("registry/cache")).ok()?;
    registries
        .flatten()
        .filter_map(|dir| fs::read(dir.path().join(format!("{NAME}.crate"))).ok())
        .find(|bytes| verify(bytes).is_ok())
}

/// Lets cargo itself download the package, with the user's registry, proxy and mirror settings.
fn fetch(out: &Path) -> Result<()> {
    let dir = out.join("fetch");
    fs::create_dir_all(dir.join("src")).map_err(|e| e.to_string())?;
    fs::write(dir.join("src/lib.rs"), "").map_err(|e| e.to_string())?;
    let manifest = "[package]\nname = \"fetch\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\
                    [workspace]\n[dependencies]\nmistralrs-core = \"=0.8.1\"\n";
    fs::write(dir.join("Cargo.toml"), manifest).map_err(|e| e.to_string())?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["fetch", "--quiet", "--manifest-path"])
        .arg(dir.join("Cargo.toml"))
        .current_dir(&dir)
        // Build scripts inherit these from the outer cargo; the inner one must not.
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .status()
        .map_err(|e| format!("cannot run `cargo fetch`: {e}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`cargo fetch` of mistralrs-core 0.8.1 failed ({status}); is the registry reachable? else set {CRATE_ENV}"))
    }
}

fn unpack(archive: &[u8], out: &Path) -> Result<PathBuf> {
    let source = out.join(NAME);
    if source.exists() {
        // A half-patched tree from an earlier run must never be patched again.
        fs::remove_dir_all(&source).map_err(|e| e.to_string())?;
    }
    tar::Archive::new(flate2::read::GzDecoder::new(archive))
        .unpack(out)
        .map_err(|e| format!("cannot unpack {NAME}.crate: {e}"))?;

    // `include!` cannot carry inner attributes; ours stand in src/lib.rs.
    let lib = source.join("src/lib.rs");
    let text = fs::read_to_string(&lib).map_err(|e| e.to_string())?;
    let kept: String = text
        .lines()
        .filter(|l| !l.starts_with("#![") && !l.starts_with("//!"))
        .flat_map(|l| [l, "\n"])
        .collect();
    fs::write(&lib, kept).map_err(|e| e.to_string())?;
    Ok(source)
}

/// Applies every `patches/**/NAME.rs.patch` to `src/**/NAME.rs`.
fn patch(source: &Path) -> Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?).join("patches");
    let mut pending = vec![root.clone()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == "patch") {
                apply(source, &root, &path)?;
            }
        }
    }
    Ok(())
}

fn apply(source: &Path, root: &Path, path: &Path) -> Result<()> {
    println!("cargo:rerun-if-changed={}", path.display());
    let relative = path.strip_prefix(root).map_err(|e| e.to_string())?.with_extension("");
    let target = source.join("src").join(&relative);
    let text = fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let base = fs::read_to_string(&target)
        .map_err(|e| format!("{} patches src/{}: {e}", path.display(), relative.display()))?;
    let patch = diffy::Patch::from_str(&text)
        .map_err(|e| format!("{} is not a unified diff: {e}", path.display()))?;
    let patched =
        diffy::apply(&base, &patch).map_err(|e| format!("{} does not apply: {e}", path.display()))?;
    fs::write(&target, patched).map_err(|e| e.to_string())
}

/// Upstream's build.rs, with the unpacked source as the root.
#[cfg(feature = "cuda")]
fn cuda_kernels(source: &Path, out: &Path) -> Result<()> {
    let mut builder = cudaforge::KernelBuilder::new()
        .source_glob(&source.join("src/cuda/*.cu").to_string_lossy())
        .out_dir(out)
        .arg("-std=c++17")
        .arg("-O3")
        .arg("-U__CUDA_NO_HALF_OPERATORS__")
        .arg("-U__CUDA_NO_HALF_CONVERSIONS__")
        .arg("-U__CUDA_NO_HALF2_OPERATORS__")
        .arg("-U__CUDA_NO_BFLOAT16_CONVERSIONS__")
        .arg("--expt-relaxed-constexpr")
        .arg("--expt-extended-lambda")
        .arg("--use_fast_math")
        .arg("--compiler-options")
        .arg("-fPIC");
    // bf16 tensor-core operations exist from compute capability 8.0 on.
    if builder.get_compute_cap().is_some_and(|cap| cap < 80) {
        builder = builder.arg("-DNO_BF16_KERNEL");
    }
    if let Some(flags) = option_env!("CUDA_NVCC_FLAGS") {
        builder = builder.arg("--compiler-options").arg(flags);
    }
    let target = env::var("TARGET").map_err(|e| e.to_string())?;
    let windows = target.contains("msvc");
    let library = out.join(if windows { "mistralrscuda.lib" } else { "libmistralrscuda.a" });
    builder.build_lib(library).map_err(|e| format!("cuda kernels: {e}"))?;
    println!("cargo:rustc-link-search={}", out.display());
    println!("cargo:rustc-link-lib=mistralrscuda");
    println!("cargo:rustc-link-lib=dylib=cudart");
    if !windows {
        let cpp = if target.contains("apple") || target.contains("freebsd") || target.contains("openbsd") {
            "c++"
        } else if target.contains("android") {
            "c++_shared"
        } else {
            "stdc++"
        };
        println!("cargo:rustc-link-lib=dylib={cpp}");
    }
    Ok(())
}
