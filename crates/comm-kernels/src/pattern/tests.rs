use super::*;

#[test]
fn hashes_are_the_documented_function() {
    // Computed by a program of its own from the formula in the documentation.
    for (seed, rank, index, expected) in [
        (0, 0, 0, 0xa706_dd2f_4d19_7e6f),
        (1, 0, 0, 0x5e41_ab08_7439_611e),
        (1, 7, 123_456_789_012, 0xe004_3fca_f44b_3da3),
        (u64::MAX, u64::MAX, u64::MAX, 0x4bff_d802_ebfb_15e4),
    ] {
        assert_eq!(hash(seed, rank, index), expected);
    }
}

#[test]
fn small_integers_are_within_bounds_and_reach_them() {
    for magnitude in [1, 8, 1024] {
        let values: Vec<i32> = (0..100_000).map(|i| small(hash(3, 0, i), magnitude)).collect();
        assert_eq!(values.iter().copied().min(), Some(-magnitude));
        assert_eq!(values.iter().copied().max(), Some(magnitude));
    }
    assert_eq!((small(0, 5), small(u64::MAX, 5)), (-5, 5));
}

fn sent(dtype: DType, pattern: &Pattern, rank: usize, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * dtype.size()];
    fill(&mut bytes, dtype, pattern, rank, 40).unwrap();
    bytes
}

#[test]
fn what_was_sent_verifies_and_anything_else_does_not() {
    for dtype in DType::ALL {
        let pattern = Pattern::new(9, None, 4);
        let mut bytes = sent(dtype, &pattern, 2, 100);
        let check =
            |bytes: &[u8], expected, first| verify(bytes, dtype, &pattern, expected, first, 7).unwrap();
        assert_eq!(check(&bytes, Expected::Sent(2), 40), Mismatches::default(), "{dtype}");
        assert!(check(&bytes, Expected::Sent(1), 40).wrong > 90, "{dtype}: another rank's data passed");
        assert!(check(&bytes, Expected::Sent(2), 41).wrong > 90, "{dtype}: shifted data passed");
        bytes[33 * dtype.size()] ^= 1;
        bytes[50 * dtype.size()] ^= 1;
        let found = check(&bytes, Expected::Sent(2), 40);
        assert_eq!(found, Mismatches { wrong: 2, first: Some(7 + 33) }, "{dtype}");
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    macro_rules! floats {
        ($ty:ty, $bits:ty, $f:expr) => {
            bytes
                .chunks(size_of::<$ty>())
                .map(|c| $f(<$ty>::from_bits(<$bits>::from_le_bytes(c.try_into().unwrap()))))
                .collect()
        };
    }
    match dtype {
        DType::F64 => floats!(f64, u64, |v| v),
        DType::F32 => floats!(f32, u32, f64::from),
        DType::F16 => floats!(half::f16, u16, f64::from),
        DType::BF16 => floats!(half::bf16, u16, f64::from),
        DType::F8E4M3 => floats!(comm_core::F8E4M3, u8, |v: comm_core::F8E4M3| v.to_f64()),
        DType::F8E5M2 => floats!(comm_core::F8E5M2, u8, |v: comm_core::F8E5M2| v.to_f64()),
        DType::I8 => bytes.iter().map(|&b| f64::from(b.cast_signed())).collect(),
        DType::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        DType::I32 => bytes.chunks(4).map(|c| f64::from(i32::from_le_bytes(c.try_into().unwrap()))).collect(),
        DType::U32 => bytes.chunks(4).map(|c| f64::from(u32::from_le_bytes(c.try_into().unwrap()))).collect(),
        #[allow(clippy::cast_precision_loss, reason = "small where it is used")]
        DType::I64 => bytes.chunks(8).map(|c| i64::from_le_bytes(c.try_into().unwrap()) as f64).collect(),
        #[allow(clippy::cast_precision_loss, reason = "small where it is used")]
        DType::U64 => bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap()) as f64).collect(),
    }
}

fn encode(dtype: DType, value: f64) -> Vec<u8> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "exact where it is used")]
    match dtype {
        DType::F64 => value.to_le_bytes().to_vec(),
        DType::F32 => (value as f32).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f64(value).to_le_bytes().to_vec(),
        DType::BF16 => half::bf16::from_f64(value).to_le_bytes().to_vec(),
        DType::F8E4M3 => vec![comm_core::F8E4M3::from_f64(value).to_bits()],
        DType::F8E5M2 => vec![comm_core::F8E5M2::from_f64(value).to_bits()],
        DType::I8 => (value as i8).to_le_bytes().to_vec(),
        DType::U8 => vec![value as u8],
        DType::I32 => (value as i32).to_le_bytes().to_vec(),
        DType::U32 => (value as u32).to_le_bytes().to_vec(),
        DType::I64 => (value as i64).to_le_bytes().to_vec(),
        DType::U64 => (value as u64).to_le_bytes().to_vec(),
    }
}

/// The promise that makes the data useful: whatever a correct backend's order of operations, and even if it rounds to
/// the type after each, the bits are the expected ones.
#[test]
fn float_results_are_exact_in_any_order() {
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.is_float()) {
        for op in [ReduceOp::Sum, ReduceOp::Prod, ReduceOp::Min, ReduceOp::Max] {
            for world in 1..=8 {
                let pattern = Pattern::new(11, Some(op), world);
                let operands: Vec<Vec<f64>> =
                    (0..world).map(|rank| decode(dtype, &sent(dtype, &pattern, rank, 200))).collect();
                let mut backwards = Vec::new();
                for i in 0..200 {
                    let mut values = operands.iter().rev().map(|operand| operand[i]);
                    let first = values.next().unwrap();
                    let total = values.fold(first, |a, b| {
                        let combined = match op {
                            ReduceOp::Prod => a * b,
                            ReduceOp::Min => a.min(b),
                            ReduceOp::Max => a.max(b),
                            _ => a + b,
                        };
                        decode(dtype, &encode(dtype, combined))[0]
                    });
                    backwards.extend(encode(dtype, total));
                }
                let found = verify(&backwards, dtype, &pattern, Expected::Reduced(op), 40, 0).unwrap();
                assert_eq!(found, Mismatches::default(), "{dtype} {op} over {world}");
            }
        }
    }
}

#[test]
fn averages_are_exact_whether_divided_before_or_after() {
    for dtype in DType::ALL {
        for world in 1..=8_u8 {
            let pattern = Pattern::new(5, Some(ReduceOp::Avg), usize::from(world));
            let operands: Vec<Vec<f64>> = (0..usize::from(world))
                .map(|rank| decode(dtype, &sent(dtype, &pattern, rank, 200)))
                .collect();
            let n = f64::from(world);
            let (mut before, mut after) = (Vec::new(), Vec::new());
            for i in 0..200 {
                before.extend(encode(dtype, operands.iter().map(|operand| operand[i] / n).sum()));
                after.extend(encode(dtype, operands.iter().map(|operand| operand[i]).sum::<f64>() / n));
            }
            for bytes in [before, after] {
                let found = verify(&bytes, dtype, &pattern, Expected::Reduced(ReduceOp::Avg), 40, 0).unwrap();
                assert_eq!(found, Mismatches::default(), "{dtype} over {world}");
            }
        }
    }
}

#[test]
fn integer_sums_wrap() {
    let pattern = Pattern::new(1, Some(ReduceOp::Sum), 3);
    let operands: Vec<Vec<u8>> = (0..3).map(|rank| sent(DType::I8, &pattern, rank, 64)).collect();
    let sums: Vec<u8> =
        (0..64).map(|i| operands.iter().fold(0_u8, |sum, operand| sum.wrapping_add(operand[i]))).collect();
    let expected = Expected::Reduced(ReduceOp::Sum);
    assert_eq!(verify(&sums, DType::I8, &pattern, expected, 40, 0).unwrap(), Mismatches::default());
}

#[test]
fn arguments_are_checked() {
    let pattern = Pattern::new(1, None, 2);
    assert!(fill(&mut [0; 7], DType::F32, &pattern, 0, 0).is_err());
    assert!(verify(&[0; 3], DType::BF16, &pattern, Expected::Sent(0), 0, 0).is_err());
    assert!(fill(&mut [0; 8], DType::F32, &Pattern::new(1, None, 0), 0, 0).is_err());
    assert_eq!(Mismatches::from_words([0, u64::MAX]), Mismatches::default());
    assert_eq!(Mismatches::from_words([3, 17]), Mismatches { wrong: 3, first: Some(17) });
}
