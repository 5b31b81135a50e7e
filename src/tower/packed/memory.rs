//! Where numbers lie: aligned buffers that are used again, and packed weights.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::Cell;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use half::bf16;

use super::kernel::{Format, LANES};
use crate::Result;

/// 64-byte aligned words of memory, zero at first.
struct Block {
    start: NonNull<u32>,
    words: usize,
}

// Safety: it owns its memory.
unsafe impl Send for Block {}
unsafe impl Sync for Block {}

impl Block {
    fn layout(words: usize) -> Layout {
        // A vector is 64 bytes; sizes here are those of tensors, far from overflowing.
        match Layout::from_size_align(words.max(1) * 4, 64) {
            Ok(layout) => layout,
            Err(_) => handle_alloc_error(Layout::new::<u32>()),
        }
    }

    fn new(words: usize) -> Self {
        let layout = Self::layout(words);
        // Safety: the layout's size is not 0.
        match NonNull::new(unsafe { alloc_zeroed(layout) }) {
            Some(start) => Self { start: start.cast(), words },
            None => handle_alloc_error(layout),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // Safety: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr().cast(), Self::layout(self.words)) }
    }
}

/// Buffers of one number of panels that are waiting to be used again: fresh memory costs a page
/// fault per 4 KiB.
#[derive(Default)]
pub struct Pool {
    free: Mutex<(usize, Vec<Block>)>,
}

impl Pool {
    /// A buffer of `panels` panels of `words` words. What is in it is not defined.
    pub fn take(self: &Arc<Self>, panels: usize, words: usize) -> Buffer {
        let length = panels * words * LANES;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.0 != panels {
            *free = (panels, Vec::new());
        }
        let found = free.1.iter().position(|block| block.words == length);
        let block = found.map(|i| free.1.swap_remove(i));
        drop(free);
        Buffer { block: Some(block.unwrap_or_else(|| Block::new(length))), panels, words, pool: self.clone() }
    }
}

/// Panels of 16 tokens with `words` words each.
pub struct Buffer {
    block: Option<Block>,
    pub panels: usize,
    pub words: usize,
    pool: Arc<Pool>,
}

impl Buffer {
    /// Its memory. Who writes there must be the only one who does.
    pub fn mat(&self) -> Mat {
        let start = self.block.as_ref().map_or(std::ptr::null_mut(), |block| block.start.as_ptr());
        Mat { start, words: self.words }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.0 == self.panels {
            free.1.extend(self.block.take());
        }
    }
}

/// The memory of a [`Buffer`].
#[derive(Clone, Copy)]
pub struct Mat {
    start: *mut u32,
    /// Words per panel.
    pub words: usize,
}

// Safety: tasks write to different panels or features, see `kernel::product`.
unsafe impl Send for Mat {}
unsafe impl Sync for Mat {}

impl Mat {
    /// The words of panel `p`.
    ///
    /// # Safety
    /// There must be such a panel.
    #[inline]
    pub unsafe fn panel(self, p: usize) -> *mut u32 {
        // Safety: the caller's.
        unsafe { self.start.add(p * self.words * LANES) }
    }
}

thread_local! {
    static SCRATCH: Cell<Option<Block>> = const { Cell::new(None) };
}

/// Gives `f` `words` words that are this thread's alone. What is in them is not defined.
pub fn with_scratch<R>(words: usize, f: impl FnOnce(*mut u32) -> R) -> R {
    let block = SCRATCH.take().filter(|block| block.words >= words).unwrap_or_else(|| Block::new(words));
    let result = f(block.start.as_ptr());
    SCRATCH.set(Some(block));
    result
}

/// A weight `(out, in)` in lines of 16 words: line `b out + o` has the words `16 b` to `16 b + 15`
/// of row o. Both dimensions are filled up with zeros to multiples of 32.
pub struct Packed<F> {
    block: Block,
    /// Rows, filled up.
    pub out: usize,
    /// Columns, filled up.
    pub inner: usize,
    shape: (usize, usize),
    format: PhantomData<F>,
}

impl<F: Format> Packed<F> {
    /// From matrices `(out, in)` of any dtype on a CPU, one below the other.
    pub fn new(weights: &[&Tensor]) -> Result<Self> {
        let mut rows = 0;
        let mut columns = 0;
        for weight in weights {
            let (out, inner) = weight.dims2()?;
            rows += out;
            columns = inner;
        }
        let (out, inner) = (rows.next_multiple_of(32), columns.next_multiple_of(32));
        let block = Block::new(out * inner / F::PER_WORD);
        let words = block.start.as_ptr();
        let mut o = 0;
        for weight in weights {
            let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            for row in values.chunks_exact(columns.max(1)) {
                for (w, numbers) in row.chunks(F::PER_WORD).enumerate() {
                    let word = match (F::PER_WORD, numbers) {
                        (1, [x]) => x.to_bits(),
                        (_, [x]) => u32::from(bf16::from_f32(*x).to_bits()),
                        (_, [x, y, ..]) => {
                            let [x, y] = [x, y].map(|v| u32::from(bf16::from_f32(*v).to_bits()));
                            x | y << 16
                        }
                        (_, []) => 0,
                    };
                    // Safety: within the block by the sizes above.
                    unsafe { *words.add((w / 16 * out + o) * LANES + w % 16) = word };
                }
                o += 1;
            }
        }
        Ok(Self { block, out, inner, shape: (rows, columns), format: PhantomData })
    }

    pub fn words(&self) -> *const u32 {
        self.block.start.as_ptr()
    }

    /// Rows of the weight as it was given.
    pub fn rows(&self) -> usize {
        self.shape.0
    }

    /// The weight again, f32; what bf16 has lost is lost.
    pub fn tensor(&self) -> Result<Tensor> {
        let (rows, columns) = self.shape;
        let mut values = Vec::with_capacity(rows * columns);
        for o in 0..rows {
            for i in 0..columns {
                let w = i / F::PER_WORD;
                // Safety: within the block, as in `new`.
                let word = unsafe { *self.words().add((w / 16 * self.out + o) * LANES + w % 16) };
                values.push(match (F::PER_WORD, i % F::PER_WORD) {
                    (1, _) => f32::from_bits(word),
                    (_, 0) => f32::from_bits(word << 16),
                    _ => f32::from_bits(word & 0xffff_0000),
                });
            }
        }
        Ok(Tensor::from_vec(values, self.shape, &Device::Cpu)?)
    }
}
