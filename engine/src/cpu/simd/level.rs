//! Which instructions the kernels are made of: the best that the CPU has, or fewer, where the environment holds them to that.

use crate::EngineError;

/// For comparison and diagnosis: `scalar`, `avx2` or `avx512`.
const VARIABLE: &str = "TANDEM_CPU_KERNELS";

/// A set of instructions; each has those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    Scalar,
    /// With FMA.
    Avx2,
    /// F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// What kernels are taken from.
    pub(crate) fn chosen() -> Result<Self, EngineError> {
        match std::env::var_os(VARIABLE) {
            None => Ok(Self::of_cpu()),
            Some(name) => Self::named(&name.to_string_lossy(), Self::of_cpu()),
        }
    }

    /// What this CPU has.
    pub(crate) fn of_cpu() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            return if wide { Self::Avx512 } else { Self::Avx2 };
        }
        Self::Scalar
    }

    fn named(name: &str, cpu: Self) -> Result<Self, EngineError> {
        let level = match name {
            "scalar" => Self::Scalar,
            "avx2" => Self::Avx2,
            "avx512" => Self::Avx512,
            _ => {
                let message = format!("{VARIABLE}={name}: it is scalar, avx2 or avx512");
                return Err(EngineError::Unsupported(message));
            }
        };
        if level > cpu {
            return Err(EngineError::Unsupported(format!(
                "{VARIABLE}={name}: this CPU has not these instructions"
            )));
        }
        Ok(level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_one_that_exists_and_that_the_cpu_has() {
        assert_eq!(Level::named("scalar", Level::Avx512).unwrap(), Level::Scalar);
        assert_eq!(Level::named("avx2", Level::Avx2).unwrap(), Level::Avx2);
        let unknown = Level::named("avx3", Level::Avx512).unwrap_err().to_string();
        assert!(unknown.contains("TANDEM_CPU_KERNELS=avx3"), "{unknown}");
        let missing = Level::named("avx512", Level::Avx2).unwrap_err().to_string();
        assert!(missing.contains("this CPU"), "{missing}");
    }
}
