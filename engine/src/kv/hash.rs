//! Names for full KV blocks: a block's hash covers its tokens and everything before them.
//!
//! `hash(i) = xxh3_128(hash(i - 1) ‖ tokens of block i as little-endian u32)`, and `hash(-1)` is the root,
//! which the caller derives from whatever else the KV depends on (model, adapter, tenant). Equal hashes
//! therefore mean equal KV. XXH3 is not a cryptographic hash: where tenants must not be able to aim at each
//! other's blocks, put a secret into the root's salt.

use xxhash_rust::xxh3::xxh3_128;

/// The name of a full block and of the chain of tokens that ends with it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash([u8; 16]);

impl BlockHash {
    /// The start of every chain under this salt.
    pub fn root(salt: &[u8]) -> Self {
        Self(xxh3_128(salt).to_le_bytes())
    }

    /// The hash of the block that follows `self` and holds `tokens`.
    pub fn next(self, tokens: &[u32]) -> Self {
        let mut bytes = Vec::with_capacity(16 + tokens.len() * 4);
        self.next_with(tokens, &mut bytes)
    }

    /// From its 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// From a slice that must be 16 bytes long.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Its 16 bytes.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// Its 16 bytes, borrowed.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    fn next_with(self, tokens: &[u32], scratch: &mut Vec<u8>) -> Self {
        scratch.clear();
        scratch.extend_from_slice(&self.0);
        for token in tokens {
            scratch.extend_from_slice(&token.to_le_bytes());
        }
        Self(xxh3_128(scratch).to_le_bytes())
    }
}

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl std::fmt::Display for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// Hashes of the full blocks of `tokens`, first block first; a partial last block has none.
///
/// # Panics
/// When `block_tokens` is 0.
pub fn chain(root: BlockHash, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
    let mut scratch = Vec::with_capacity(16 + block_tokens * 4);
    let mut hash = root;
    tokens
        .chunks_exact(block_tokens)
        .map(|block| {
            hash = hash.next_with(block, &mut scratch);
            hash
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fixed_values_do_not_change_between_releases() {
        let root = BlockHash::root(b"tandem");
        let hashes = chain(root, &[1, 2, 3, 4, 5], 2);
        assert_eq!(hashes.len(), 2);
        assert_eq!(hashes[0], root.next(&[1, 2]));
        assert_eq!(hashes[1], hashes[0].next(&[3, 4]));
        // XXH3-128 of the empty input is 99aa06d3014798d86001c324468d497f.
        let empty = 0x99aa_06d3_0147_98d8_6001_c324_468d_497f_u128;
        assert_eq!(BlockHash::root(b""), BlockHash::from_bytes(empty.to_le_bytes()));
    }

    proptest! {
        #[test]
        fn a_chain_is_its_prefixes(tokens in proptest::collection::vec(any::<u32>(), 0..80), block in 1usize..9, cut in 0usize..80) {
            let root = BlockHash::root(b"m");
            let whole = chain(root, &tokens, block);
            prop_assert_eq!(whole.len(), tokens.len() / block);
            let cut = cut.min(tokens.len());
            let part = chain(root, &tokens[..cut], block);
            prop_assert_eq!(&whole[..part.len()], &part[..]);
        }

        #[test]
        fn any_changed_token_changes_every_later_hash(tokens in proptest::collection::vec(any::<u32>(), 4..40), at in 0usize..40, bit in 0u32..32) {
            let root = BlockHash::root(b"m");
            let at = at % tokens.len();
            let mut other = tokens.clone();
            other[at] ^= 1 << bit;
            let (a, b) = (chain(root, &tokens, 4), chain(root, &other, 4));
            for i in 0..a.len() {
                prop_assert_eq!(a[i] == b[i], i < at / 4);
            }
        }

        #[test]
        fn bytes_round_trip(bytes in any::<[u8; 16]>()) {
            let hash = BlockHash::from_bytes(bytes);
            prop_assert_eq!(BlockHash::from_slice(&hash.to_bytes()), Some(hash));
            prop_assert_eq!(BlockHash::from_slice(&bytes[..15]), None);
        }
    }
}
