// What Python hands over: `moshi_ttt/kernels/native_form.py` has the same fields in the same order.

#pragma once

namespace ttt {

// A sequence of N nets, cut into mini-batches of `size` tokens, of which the last may have fewer.
// Lists of `2 * depth` have the weights `[..., d_in, d_out]` of each layer, then the biases `[..., d_out]`.
template <class T>
struct Problem {
    long nets, heads, tokens, size, depth, group, threads;
    const long* widths;                        // [depth + 1]
    const double* factors;                     // of the step sizes of each layer
    const double* radii;                       // of the bound of each layer; null: no bound
    const T *q, *k, *target, *lr;              // [N, T, D], lr [N, T]
    const T *norm_weight, *norm_bias, *scale;  // [N, D], [size, size]
    T* const* center;                          // of the bound, [heads, ...]
    T* const* starts;                          // of each group of mini-batches, a list of [N, ...]; see `Forward::net`
    T *key_outputs, *query_outputs;            // [N, T, D], of the last layer, before its LayerNorm
    T* shrinks;                                // [mini-batches, N, depth]: what the bound drew the weights back by

    long mini_batches() const { return (tokens + size - 1) / size; }
    long groups() const { return (mini_batches() + group - 1) / group; }
    long width() const { return widths[0]; }
    long inputs(long layer) const { return widths[layer]; }
    long outputs(long layer) const { return widths[layer + 1]; }
    long widest() const {
        long most = 0;
        for (long l = 0; l <= depth; l++) most = widths[l] > most ? widths[l] : most;
        return most;
    }
    long weights() const {
        long sum = 0;
        for (long l = 0; l < depth; l++) sum += inputs(l) * outputs(l);
        return sum;
    }
    bool hidden(long layer) const { return layer + 1 < depth; }
};

// Gradients of the outer loss. Those of the state are, on entry, of the last weights, and on return of the first.
template <class T>
struct Gradients {
    const T* out;                               // [N, T, D]
    T *q, *k, *target, *lr;                     // as in Problem
    T *norm_weight, *norm_bias, *scale;         // [N, D], [N, size, size]; added to
    T *const *state, *const *center;            // [N, ...]; center is added to, and null where nothing was drawn back
};

}  // namespace ttt
