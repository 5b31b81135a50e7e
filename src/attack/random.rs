use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use sha2::{Digest, Sha256};

/// The random numbers of one picture, the same on every platform and in every batch.
///
/// ChaCha8 seeded with SHA-256 over `seed`, the picture's `key`, the number of the `restart` and
/// the `purpose` (an attack's name), so that no two of them share a stream.
pub fn picture_rng(seed: u64, key: u64, restart: u64, purpose: &str) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(b"radapt attack\0");
    for number in [seed, key, restart] {
        hash.update(number.to_le_bytes());
    }
    hash.update(purpose.as_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// `n` numbers, uniform on the 2^24 multiples of 2^-23 in [-1, 1).
pub fn uniform(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    const STEP: f32 = 1.0 / (1 << 23) as f32;
    (0..n).map(|_| (rng.next_u32() >> 8) as f32 * STEP - 1.0).collect()
}
