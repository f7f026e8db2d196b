//! Copies between dense and pitched ranges.

/// Bytes that follow each other in rows of `width`, `pitch` bytes apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Layout {
    base: usize,
    width: usize,
    pitch: usize,
}

impl Layout {
    /// Bytes without gaps from `base` on.
    pub(super) fn dense(base: usize) -> Self {
        Self { base, width: usize::MAX, pitch: 0 }
    }

    /// Rows of `width` bytes, `pitch` bytes apart.
    pub(super) fn rows(base: usize, width: usize, pitch: usize) -> Self {
        if width == pitch { Self::dense(base) } else { Self { base, width: width.max(1), pitch } }
    }

    /// A dense range that holds the bytes from number `from` on.
    pub(super) fn window(base: usize, from: usize) -> Self {
        Self::dense(base.wrapping_sub(from))
    }

    /// The address of byte `at`, and how many follow it without a gap.
    fn run(&self, at: usize) -> (usize, usize) {
        if self.width == usize::MAX {
            return (self.base.wrapping_add(at), usize::MAX);
        }
        let (row, column) = (at / self.width, at % self.width);
        (self.base.wrapping_add(row * self.pitch + column), self.width - column)
    }
}

/// The gapless pieces of bytes number `from..to`: where each lies in `dst` and in `src`, and its length.
pub(super) fn runs(
    dst: Layout,
    src: Layout,
    from: usize,
    to: usize,
) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = from;
    std::iter::from_fn(move || {
        let ((source, readable), (target, writable)) = (src.run(at), dst.run(at));
        let len = to.saturating_sub(at).min(readable).min(writable);
        at += len;
        (len > 0).then_some((target, source, len))
    })
}

/// Copies bytes number `from..to`.
///
/// # Safety
/// They are valid for reads in `src` and for writes in `dst`, and do not overlap, or are the very same bytes.
pub(super) unsafe fn copy(dst: Layout, src: Layout, from: usize, to: usize) {
    for (target, source, len) in runs(dst, src, from, to) {
        if source != target {
            // SAFETY: the run is part of both ranges, as the caller vouches.
            unsafe { std::ptr::copy_nonoverlapping(source as *const u8, target as *mut u8, len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pitched_to_pitched() {
        let src: Vec<u8> = (0..20).collect();
        let mut dst = [0_u8; 24];
        let from = Layout::rows(src.as_ptr() as usize, 3, 5);
        let to = Layout::rows(dst.as_mut_ptr() as usize, 3, 6);
        // SAFETY: four rows of three bytes lie in both arrays.
        unsafe { copy(to, from, 1, 12) };
        let rows: Vec<&[u8]> = dst.chunks(6).map(|row| &row[..3]).collect();
        assert_eq!(rows, [[0, 1, 2], [5, 6, 7], [10, 11, 12], [15, 16, 17]]);
        assert!(dst.chunks(6).all(|row| row[3..] == [0; 3]));
    }
}
