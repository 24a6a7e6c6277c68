"""Capstan's addressed randomness in NumPy, so that a reference starts from the very numbers that Capstan starts from.

Philox4x32-10 (Salmon et al., SC 2011), normals by AS241 (Wichura 1988): see core/include/capstan/random.h. The C++ side
uses fused multiply-add, NumPy has none: doubles may differ in the last bits, floats made from them hardly ever do.
"""
import numpy as np

MASK = (1 << 64) - 1


def hash_name(name):
    h = 14695981039346656037
    for c in name.encode():
        h = ((h ^ c) * 1099511628211) & MASK
    return h


def mix64(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def philox4x32_10(key, step, index):
    """`index` is an array of u64; gives [n, 4] u32 words, held in u64."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1 = index & low, index >> half
    c2, c3 = np.full_like(index, step & 0xFFFFFFFF), np.full_like(index, step >> 32)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c2 = (b >> half) ^ c1 ^ np.uint64(k0), (a >> half) ^ c3 ^ np.uint64(k1)
        c1, c3 = b & low, a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def polynomial(r, coefficients):
    total = np.zeros_like(r)
    for c in coefficients:
        total = total * r + c
    return total


def normal_quantile(p):
    q = p - 0.5
    r = 0.180625 - q * q
    middle = q * polynomial(r, [2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
                                13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608]) \
        / polynomial(r, [5226.495278852545925, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
                         5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0])
    t = np.sqrt(-np.log(np.minimum(p, 1 - p)))
    r = t - 1.6
    near = polynomial(r, [7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
                          3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734]) \
        / polynomial(r, [1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
                         0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0])
    # Beyond 5 lie probabilities under 1.4e-11: 32-bit uniforms never get there.
    assert np.all(t <= 5)
    return np.where(np.abs(q) <= 0.425, middle, np.sign(q) * near)


class Rng:
    """Element i of stream `name` at `step` is a pure function of (seed, name, i, step)."""

    def __init__(self, seed, name, step=0):
        self.key, self.step = mix64(seed ^ hash_name(name)), step

    def bits(self, count):
        blocks = philox4x32_10(self.key, self.step, np.arange((count + 3) // 4, dtype=np.uint64))
        return blocks.reshape(-1)[:count]

    def uniform(self, count):
        return (self.bits(count).astype(np.float64) + 0.5) * 2.0 ** -32

    def normal(self, count):
        return normal_quantile(self.uniform(count))

    def below(self, count, n):
        b = self.bits(2 * count)
        return np.array([(((int(b[2 * i]) << 32) | int(b[2 * i + 1])) * n) >> 64 for i in range(count)], dtype=np.int64)
