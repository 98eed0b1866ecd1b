// One token of each net, for streaming: `inner_step` and `fold_finished` of `moshi_ttt/inner_loop.py`.
//
// A net's weights are more than a core's inner caches hold together with those of the next net, so each is
// read from memory once, and what needs it is done while it is near.

#pragma once

#include "net.h"

namespace ttt {

// The factors of the updates that the current mini-batch has gathered, one slot a token.
template <class T>
struct Pending {
    T *const *inputs, *const *grads, *lr;  // of each layer [N, size, ...]; [N, size]
    const long* positions;                 // of the token in its mini-batch, [N]
    const bool* finished;                  // nets whose mini-batch is over, [N]
};

// out += x W for up to two vectors, with W [inputs, outputs] read in its own order, once.
template <class T, int VECTORS>
void add_products(long inputs, long outputs, const T* const* x, const T* weight, T* const* out) {
    constexpr int LANES = LanesOf<T>::count, ROWS = 4;
    const long whole_rows = inputs / ROWS * ROWS, whole = outputs / LANES * LANES;
    for (long i = 0; i < whole_rows; i += ROWS)
        for (long j = 0; j < whole; j += LANES) {
            Lanes<T> w[ROWS];
            for (int r = 0; r < ROWS; r++) w[r] = lanes(weight + (i + r) * outputs + j);
            for (int v = 0; v < VECTORS; v++) {
                Lanes<T> sum = lanes(out[v] + j);
                for (int r = 0; r < ROWS; r++) sum += x[v][i + r] * w[r];
                lanes(out[v] + j) = sum;
            }
        }
    for (long i = 0; i < inputs; i++)
        for (long j = i < whole_rows ? whole : 0; j < outputs; j++)
            for (int v = 0; v < VECTORS; v++) out[v][j] += x[v][i] * weight[i * outputs + j];
}

template <class T>
class Step {
   public:
    explicit Step(const Problem<T>& p)
        : p(p),
          keys(layers_of(p, 1, 1)),
          queries(layers_of(p, 1, 1)),
          slopes(layers_of(p, 1, 1)),
          inputs(layers_of(p, 1, 0)),
          normed(p.width()),
          scaled(p.size * p.widest()) {}

    // Answer the token and put its update into its slot.
    void net(long index, T* const* state, const Pending<T>& pending, T* out) {
        const long width = p.width(), slot = index * p.size + pending.positions[index];
        const Weights<T> now(p, state, index);
        auto slot_of = [&](T* const* of, long layer, long after) { return of[layer] + slot * p.widths[layer + after]; };
        pending.lr[slot] = p.lr[index];
        std::memcpy(slot_of(pending.inputs, 0, 0), p.k + index * width, width * sizeof(T));
        std::memcpy(inputs[0], p.q + index * width, width * sizeof(T));
        for (long l = 0; l < p.depth; l++) {
            // The first layer's weights are near now: the query's part is done at once.
            through(l, slot_of(pending.inputs, l, 0), l == 0, now);
            if (p.hidden(l)) gelu(p.outputs(l), keys[l], slot_of(pending.inputs, l + 1, 0), slopes[l]);
        }
        loss_gradient<T>(p, index, keys[p.depth - 1], p.target + index * width, normed,
                         slot_of(pending.grads, p.depth - 1, 1));
        for (long l = p.depth - 2; l >= 0; l--) {
            const long next = p.outputs(l + 1);
            T *grad = slot_of(pending.grads, l, 1), *after = slot_of(pending.grads, l + 1, 1);
            for (long i = 0; i < p.outputs(l); i++)
                grad[i] = slopes[l][i] * dot(next, now.weight[l + 1] + i * next, after);
        }
        for (long l = 0; l < p.depth; l++)
            for (long i = 0; i < p.outputs(l); i++) slot_of(pending.grads, l, 1)[i] *= T(p.factors[l]);
        answer(index, now, pending, out + index * width);
    }

    // Add the updates of a mini-batch that is over to the weights, and draw these back into the bound.
    void finish(long index, T* const* state, const Pending<T>& pending) {
        if (!pending.finished[index]) return;
        const Weights<T> now(p, state, index);
        for (long l = 0; l < p.depth; l++) {
            const long out = p.outputs(l), first = index * p.size;
            for (long s = 0; s < p.size; s++) {
                const T step = p.scale[(p.size - 1) * p.size + s] * pending.lr[first + s];
                const T* grad = pending.grads[l] + (first + s) * out;
                for (long i = 0; i < out; i++) scaled[s * out + i] = step * grad[i];
            }
            fold<Into::subtract, T>(p, l, p.size, pending.inputs[l] + first * p.inputs(l), scaled, now);
            if (!p.radii) continue;
            const Weights<T> center(p, p.center, index % p.heads);
            const double distance = std::sqrt(square_distance(p, l, now, center));
            if (distance > p.radii[l]) draw(p, l, now, center, T(p.radii[l] / distance));
        }
    }

   private:
    const Problem<T>& p;
    const std::vector<Buffer<T>> keys, queries, slopes, inputs;  // Z of key and query, slopes at it, X of the query
    const Buffer<T> normed, scaled;

    // Z of the key with input x, and with `both` Z of the query before the mini-batch's updates.
    void through(long layer, const T* x, bool both, const Weights<T>& now) {
        const long in = p.inputs(layer), out = p.outputs(layer);
        const T* from[] = {x, inputs[layer]};
        T* const to[] = {keys[layer], queries[layer]};
        std::memcpy(to[0], now.bias[layer], out * sizeof(T));
        if (!both) return add_products<T, 1>(in, out, from, now.weight[layer], to);
        std::memcpy(to[1], now.bias[layer], out * sizeof(T));
        add_products<T, 2>(in, out, from, now.weight[layer], to);
    }

    static void gelu(long count, const T* z, T* value, T* slope) {
        each<T>(count, z, [&](long i, long many, const Gelu<T>& here) {
            put<T>(value + i, many, here.value());
            if (slope) put<T>(slope + i, many, here.slope());
        });
    }

    // The query with the weights that hold the mini-batch's updates up to this token's.
    void answer(long index, const Weights<T>& now, const Pending<T>& pending, T* out) {
        const long width = p.width(), position = pending.positions[index], first = index * p.size;
        for (long l = 0; l < p.depth; l++) {
            const long in = p.inputs(l), count = p.outputs(l);
            T* z = queries[l];
            if (l > 0) {
                std::memcpy(z, now.bias[l], count * sizeof(T));
                const T* from[] = {inputs[l]};
                T* const to[] = {z};
                add_products<T, 1>(in, count, from, now.weight[l], to);
            }
            for (long s = 0; s <= position; s++) {
                const T eta = p.scale[position * p.size + s] * pending.lr[first + s];
                const T step = eta * (dot<T>(in, inputs[l], pending.inputs[l] + (first + s) * in) + 1);
                add(count, pending.grads[l] + (first + s) * count, z, -step);
            }
            if (p.hidden(l)) gelu(count, z, inputs[l + 1], nullptr);
        }
        const T *weight = p.norm_weight + index * width, *bias = p.norm_bias + index * width;
        normalise<T>(width, queries[p.depth - 1], normed);
        for (long i = 0; i < width; i++) out[i] = p.q[index * width + i] + (bias[i] + normed[i] * weight[i]);
    }
};

}  // namespace ttt
