//! How large a decoder layer is, and which part of it one rank of a tensor-parallel group holds.
//!
//! Megatron's split: of the projections into a block (queries, keys and values; gate and up) a rank holds some of the
//! outputs, of those out of it (attention's output; down) the matching inputs. So a block needs one all-reduce, at its
//! end.

use anyhow::{Result, ensure};
use comm_kernels::layer::{Heads, UniformBlock};

/// A decoder layer's dimensions, of the whole model.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shape {
    /// Elements of a token's hidden state.
    pub hidden: usize,
    /// Attention's heads.
    pub heads: Heads,
    /// Elements between the MLP's projections.
    pub intermediate: usize,
}

impl Shape {
    /// Llama 2 and 3, 70B.
    pub const LLAMA_70B: Self =
        Self { hidden: 8192, heads: Heads { query: 64, key_value: 8, size: 128 }, intermediate: 28_672 };

    /// Small enough for processors.
    pub const SMALL: Self =
        Self { hidden: 256, heads: Heads { query: 8, key_value: 4, size: 32 }, intermediate: 896 };

    /// Whether `world` ranks can share a layer.
    ///
    /// # Errors
    /// When they cannot.
    pub fn check(&self, world: usize) -> Result<()> {
        let shared = [self.heads.query, self.heads.key_value, self.intermediate / 8];
        ensure!(
            world > 0 && shared.iter().all(|&whole| whole.is_multiple_of(world)),
            "{world} ranks cannot share {} key/value heads and {} intermediate elements evenly; try 2, 4 or 8",
            self.heads.key_value,
            self.intermediate
        );
        Ok(())
    }
}

/// One rank's part of a layer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shard {
    /// The whole layer.
    pub shape: Shape,
    /// This rank.
    pub rank: usize,
    /// The ranks that share the layer.
    pub world: usize,
}

impl Shard {
    /// The layer as one GPU alone holds it.
    pub fn whole(shape: Shape) -> Self {
        Self { shape, rank: 0, world: 1 }
    }

    /// This rank's heads.
    pub fn heads(&self) -> Heads {
        let whole = self.shape.heads;
        Heads { query: whole.query / self.world, key_value: whole.key_value / self.world, ..whole }
    }

    /// Elements of this rank's part of attention's output.
    pub fn attended(&self) -> usize {
        self.heads().query * self.heads().size
    }

    /// This rank's part of the MLP's intermediate elements.
    pub fn intermediate(&self) -> usize {
        self.shape.intermediate / self.world
    }

    /// Rows of the whole queries-keys-values projection that are this rank's: its queries, its keys, its values.
    pub fn qkv_rows(&self) -> Vec<(usize, usize)> {
        let (whole, own) = (self.shape.heads, self.heads());
        let (queries, keys) = (whole.query * whole.size, whole.key_value * whole.size);
        let (own_queries, own_keys) = (own.query * own.size, own.key_value * own.size);
        vec![
            (self.rank * own_queries, own_queries),
            (queries + self.rank * own_keys, own_keys),
            (queries + keys + self.rank * own_keys, own_keys),
        ]
    }

    /// Rows of the whole gate-and-up projection that are this rank's: its gate, its up.
    pub fn gate_up_rows(&self) -> Vec<(usize, usize)> {
        let own = self.intermediate();
        vec![(self.rank * own, own), (self.shape.intermediate + self.rank * own, own)]
    }
}

/// Blocks of the whole random matrix of `columns` columns that hold the given rows (first, number), one after the other.
/// The values have a variance of `1 / columns`, so that a product with them keeps its input's magnitude.
pub fn row_blocks(rows: &[(usize, usize)], columns: usize, seed: u64) -> Vec<UniformBlock> {
    let block = |&(first_row, rows): &(usize, usize)| UniformBlock {
        rows,
        columns,
        first_row,
        first_column: 0,
        whole_columns: columns,
        seed,
        scale: (3.0 / columns as f32).sqrt(),
    };
    rows.iter().map(block).collect()
}

/// The block of the whole random matrix of `rows` rows that holds the `rank`-th of `world` parts of its columns.
pub fn column_block(
    rows: usize,
    whole_columns: usize,
    (rank, world): (usize, usize),
    seed: u64,
) -> UniformBlock {
    let columns = whole_columns / world;
    UniformBlock {
        rows,
        columns,
        first_row: 0,
        first_column: rank * columns,
        whole_columns,
        seed,
        scale: (3.0 / whole_columns as f32).sqrt(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_rows_are_all_rows_once() {
        for world in [1, 2, 4, 8] {
            let shape = Shape::LLAMA_70B;
            shape.check(world).unwrap();
            for (rows_of, whole) in [
                (Shard::qkv_rows as fn(&Shard) -> Vec<(usize, usize)>, shape.heads.qkv()),
                (Shard::gate_up_rows, 2 * shape.intermediate),
            ] {
                let mut seen = vec![0; whole];
                for rank in 0..world {
                    for (first, rows) in rows_of(&Shard { shape, rank, world }) {
                        seen[first..first + rows].iter_mut().for_each(|times| *times += 1);
                    }
                }
                assert!(seen.iter().all(|&times| times == 1), "{world}");
            }
        }
    }

    #[test]
    fn uneven_worlds_are_refused() {
        assert!(Shape::LLAMA_70B.check(3).unwrap_err().to_string().contains("try 2, 4 or 8"));
        assert!(Shape::LLAMA_70B.check(16).is_err());
        assert!(Shape::SMALL.check(4).is_ok());
    }
}
