// The gradient of the inner loss at the last layer's output, and the way back through it, for the keys of a
// mini-batch: `moshi_ttt/loss_gradient.py`, and so are the names.

#pragma once

#include "net.h"

namespace ttt {

template <class T>
class Loss {
   public:
    explicit Loss(const Problem<T>& p)
        : p(p),
          normed(p.size * p.width()),
          error(p.size * p.width()),
          a(p.size * p.width()),
          through(p.width()),
          inverse(p.size) {}

    // G of `rows` tokens from the outputs z.
    void forward(long net, long rows, const T* z, const T* target, T* grads) {
        const long width = p.width();
        const T *weight = p.norm_weight + net * width, *bias = p.norm_bias + net * width;
        for (long s = 0; s < rows; s++) {
            T *n = normed + s * width, *e = error + s * width, *of = a + s * width;
            inverse[s] = normalise(width, z + s * width, n);
#pragma omp simd
            for (long i = 0; i < width; i++) {
                e[i] = weight[i] * n[i] + bias[i] - target[s * width + i];
                of[i] = e[i] * weight[i];
            }
            through_normed(width, of, n, inverse[s], grads + s * width);
        }
    }

    // dz from dG. The gradient of the target is written, those of the LayerNorm are added.
    void backward(long net, long rows, const T* grads, const T* d_grads, T* d_z, T* d_target, T* d_weight,
                  T* d_bias) {
        const long width = p.width();
        const T* weight = p.norm_weight + net * width;
        for (long s = 0; s < rows; s++) {
            const T *n = normed + s * width, *e = error + s * width, *of = a + s * width, *dg = d_grads + s * width;
            const T r = inverse[s], r_a_n = r * dot(width, of, n) / width, r_g_n = r * dot(width, n, dg) / width;
            const T d_r_by_r = r * dot(width, grads + s * width, dg) / width;
            T *d_a = through, *dz = d_z + s * width;
            through_normed(width, dg, n, r, d_a);
#pragma omp simd
            for (long i = 0; i < width; i++) {
                const T d_error = d_a[i] * weight[i];
                d_target[s * width + i] = -d_error;
                d_weight[i] += d_a[i] * e[i] + d_error * n[i];
                d_bias[i] += d_error;
                d_a[i] = d_error * weight[i] - dg[i] * r_a_n - of[i] * r_g_n;
            }
            through_normed(width, d_a, n, r, dz);
            add(width, n, dz, -d_r_by_r);
        }
    }

   private:
    const Problem<T>& p;
    const Buffer<T> normed, error, a, through, inverse;
};

}  // namespace ttt
