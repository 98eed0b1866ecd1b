// Gradients of one net's sequence, last mini-batch to first: `moshi_ttt/mini_batches_backward.py` by hand, and
// so are the names. `d_x` is the gradient of the outer loss at x.
//
// The weights that each mini-batch started with are not kept. A group of mini-batches is gone through again
// from its first weights, which keeps what its updates were made of; going back, each is undone. Where the
// bound drew the weights back that would magnify rounding, and a copy is kept.

#pragma once

#include <map>

#include "loss.h"

namespace ttt {

template <class T>
class Backward {
   public:
    explicit Backward(const Problem<T>& p)
        : p(p),
          turned(p),
          loss(p),
          inputs(layers_of(p, 3 * p.size, 0)),
          outputs(layers_of(p, 3 * p.size, 1)),
          scaled(layers_of(p, p.size, 1)),
          slopes(layers_of(p, p.size, 1)),
          curves(layers_of(p, p.size, 1)),
          query_slopes(layers_of(p, p.size, 1)),
          d_inputs(layers_of(p, p.size, 0)),
          d_inputs_turned(layers_of(p, p.size, 0)),
          d_grads(layers_of(p, p.size, 1)),
          kept_outputs(layers_of(p, std::min(p.group, p.mini_batches()) * p.size, 1)),
          kept_throughs(layers_of(p, std::min(p.group, p.mini_batches()) * p.size, 1)),
          products(p.depth * p.size * p.size),
          d_eta(p.size * p.size),
          steps(p.size * p.size),
          d_steps(p.size * p.size),
          d_x(p.size * p.widest()),
          d_scaled(p.size * p.widest()),
          state(p) {}

    // On entry `d.state` is the gradient of the weights after the sequence, on return of those before it.
    void net(long index, const Gradients<T>& d) {
        const Weights<T> now = state.weights(p), d_now(p, d.state, index);
        for (long g = p.groups() - 1; g >= 0; g--) {
            const long first = g * p.group, end = std::min(first + p.group, p.mini_batches());
            copy_weights(p, Weights<T>(p, p.starts + g * 2 * p.depth, index), now);
            before_bound.clear();
            for (long m = first; m < end; m++) again(Place(p, index, m, m - first), now);
            for (long m = end - 1; m >= first; m--) back(Place(p, index, m, m - first), now, d_now, d);
        }
    }

   private:
    // A mini-batch of a net, and its slot in what is kept of a group.
    struct Place {
        long net, mini_batch, slot;
        Tokens<T> tokens;
        Place(const Problem<T>& p, long net, long mini_batch, long slot)
            : net(net), mini_batch(mini_batch), slot(slot), tokens(p, net, mini_batch) {}
    };
    typedef std::vector<Buffer<T>> Layers;

    const Problem<T>& p;
    const Turned<T> turned;
    Loss<T> loss;
    // Rows of three kinds, so that one product gives the gradient of a layer's weights:
    //   inputs:  X of the keys,  X of the queries,  gradient of what G of the layer before is made of
    //   outputs: dZ of the keys, dZ of the queries, G
    const Layers inputs, outputs;
    const Layers scaled, slopes, curves, query_slopes;
    const Layers d_inputs, d_inputs_turned, d_grads;  // of the keys' X, its transposed part with a minus; of G
    const Layers kept_outputs, kept_throughs;         // Z of the hidden layers, and the loss gradient after GELU
    const Buffer<T> products, d_eta, steps, d_steps, d_x, d_scaled;
    const OwnWeights<T> state;
    std::map<long, OwnWeights<T>> before_bound;  // by the slot of the mini-batch that ended outside

    T* of_queries(const Layers& rows, long layer, long length, long width) const {
        return rows[layer] + length * width;
    }
    T* grads(long layer, long length) const { return outputs[layer] + 2 * length * p.outputs(layer); }
    T* d_through(long layer, long length) const { return inputs[layer + 1] + 2 * length * p.inputs(layer + 1); }
    T* kept(const Layers& of, long layer, long slot) const {
        return of[layer] + slot * p.size * p.outputs(layer);
    }
    T shrink(const Place& at, long layer) const {
        return p.shrinks ? p.shrinks[(at.mini_batch * p.nets + at.net) * p.depth + layer] : T(1);
    }
    bool drawn(const Place& at) const {
        for (long l = 0; l < p.depth; l++)
            if (shrink(at, l) != 1) return true;
        return false;
    }

    // Forward once more: keeps Z and the loss gradients after GELU, and leaves the weights after the mini-batch.
    void again(const Place& at, const Weights<T>& now) {
        const long length = at.tokens.length, last = p.depth - 1;
        std::memcpy(inputs[0], at.tokens.k, length * p.width() * sizeof(T));
        for (long l = 0; l < last; l++) {
            T *z = kept(kept_outputs, l, at.slot), *gelu = inputs[l + 1];
            affine<T>(length, p.inputs(l), p.outputs(l), inputs[l], now.weight[l], now.bias[l], z);
            each<T>(length * p.outputs(l), z, [&](long i, long count, const Gelu<T>& here) {
                put<T>(gelu + i, count, here.value());
                put<T>(slopes[l] + i, count, here.slope());
            });
        }
        loss_grads(at);
        for (long l = last - 1; l >= 0; l--) {
            T *through = kept(kept_throughs, l, at.slot), *grad = grads(l, length), *slope = slopes[l];
            back_through<T>(turned, length, p.outputs(l), p.outputs(l + 1), now.weight[l + 1], grads(l + 1, length),
                            through);
#pragma omp simd
            for (long i = 0; i < length * p.outputs(l); i++) grad[i] = slope[i] * through[i];
        }
        if (drawn(at)) copy_weights(p, now, before_bound.emplace(at.slot, p).first->second.weights(p));
        for (long l = 0; l < p.depth; l++) {
            scale_grads<T>(p, at.tokens, l, grads(l, length), scaled[l]);
            fold<Into::subtract, T>(p, l, length, inputs[l], scaled[l], now);
            if (shrink(at, l) != 1) draw(p, l, now, Weights<T>(p, p.center, at.net % p.heads), shrink(at, l));
        }
    }

    void loss_grads(const Place& at) {
        const long from = at.tokens.first * p.width(), length = at.tokens.length;
        loss.forward(at.net, length, p.key_outputs + from, at.tokens.target, grads(p.depth - 1, length));
    }

    // Through one mini-batch. On return the weights are those before it.
    void back(const Place& at, const Weights<T>& now, const Weights<T>& d_now, const Gradients<T>& d) {
        for (long l = 0; l < p.depth; l++)
            if (shrink(at, l) != 1) bound(at, l, now, d_now, d);
        made_of_keys(at);
        if (drawn(at))
            copy_weights(p, before_bound.at(at.slot).weights(p), now);
        else
            for (long l = 0; l < p.depth; l++)
                fold<Into::add, T>(p, l, at.tokens.length, inputs[l], scaled[l], now);
        made_of_queries(at, now);
        std::memset(d_eta, 0, p.size * p.size * sizeof(T));
        queries(at, now, d);
        keys(at, now, d_now, d);
        rates(at, d);
    }

    // Through the bound: W' = center + radius u, of W's direction u.
    void bound(const Place& at, long layer, const Weights<T>& now, const Weights<T>& d_now, const Gradients<T>& d) {
        const Weights<T> center(p, p.center, at.net % p.heads), d_center(p, d.center, at.net);
        const T factor = shrink(at, layer), square = p.radii[layer] * p.radii[layer];
        const long width = p.outputs(layer);
        double along = 0;
        for (long r = 0; r <= p.inputs(layer); r++) {
            const Rows rows(layer, r, width, p.inputs(layer), now, d_now, center, d_center);
            for (long i = 0; i < width; i++) along += (rows.now[i] - rows.center[i]) * rows.d_now[i];
        }
        const T of_change = along / square;
        for (long r = 0; r <= p.inputs(layer); r++) {
            const Rows rows(layer, r, width, p.inputs(layer), now, d_now, center, d_center);
            for (long i = 0; i < width; i++) {
                const T change = rows.now[i] - rows.center[i], whole = rows.d_now[i];
                rows.d_now[i] = factor * (whole - change * of_change);
                rows.d_center[i] += whole - rows.d_now[i];
            }
        }
    }

    // Row r of a layer's weight, or its bias behind the last row.
    struct Rows {
        T *now, *d_now, *center, *d_center;
        Rows(long l, long r, long width, long count, const Weights<T>& w, const Weights<T>& dw, const Weights<T>& c,
             const Weights<T>& dc) {
            auto of = [&](const Weights<T>& x) { return r < count ? x.weight[l] + r * width : x.bias[l]; };
            now = of(w), d_now = of(dw), center = of(c), d_center = of(dc);
        }
    };

    // X, G and the derivatives of GELU of the keys, from what was kept.
    void made_of_keys(const Place& at) {
        const long length = at.tokens.length;
        std::memcpy(inputs[0], at.tokens.k, length * p.width() * sizeof(T));
        loss_grads(at);
        for (long l = 0; l < p.depth; l++) {
            T *grad = grads(l, length), *curve = curves[l], *slope = slopes[l];
            if (p.hidden(l)) {
                T *gelu = inputs[l + 1], *through = kept(kept_throughs, l, at.slot);
                each<T>(length * p.outputs(l), kept(kept_outputs, l, at.slot),
                        [&](long i, long count, const Gelu<T>& here) {
                            put<T>(gelu + i, count, here.value());
                            put<T>(slope + i, count, here.slope());
                            put<T>(curve + i, count, here.second());
                        });
#pragma omp simd
                for (long i = 0; i < length * p.outputs(l); i++) {
                    grad[i] = slope[i] * through[i];
                    curve[i] *= through[i];
                }
            }
            scale_grads<T>(p, at.tokens, l, grad, scaled[l]);
        }
    }

    // X and the derivatives of GELU of the queries, and x X^T + 1.
    void made_of_queries(const Place& at, const Weights<T>& now) {
        const long length = at.tokens.length;
        std::memcpy(of_queries(inputs, 0, length, p.width()), at.tokens.q, length * p.width() * sizeof(T));
        for (long l = 0; l < p.depth; l++) {
            T *x = of_queries(inputs, l, length, p.inputs(l)), *product_of = products + l * p.size * p.size;
            each_with_each<T>(turned, length, p.inputs(l), x, inputs[l], product_of);
            for (long i = 0; i < length * length; i++) product_of[i] += 1;
            if (!p.hidden(l)) break;
            times_eta(at, l, product_of, steps);
            T *z = d_x, *gelu = of_queries(inputs, l + 1, length, p.inputs(l + 1)), *slope = query_slopes[l];
            affine<T>(length, p.inputs(l), p.outputs(l), x, now.weight[l], now.bias[l], z);
            product<Into::subtract, T>(length, p.outputs(l), length, plain<T>(steps, length), grads(l, length),
                                       p.outputs(l), z, p.outputs(l));
            each<T>(length * p.outputs(l), z, [&](long i, long count, const Gelu<T>& here) {
                put<T>(gelu + i, count, here.value());
                put<T>(slope + i, count, here.slope());
            });
        }
    }

    void times_eta(const Place& at, long layer, const T* x, T* to) {
        const long length = at.tokens.length;
        for (long t = 0; t < length; t++)
            for (long s = 0; s < length; s++)
                to[t * length + s] = x[t * length + s] * step_size(p, at.tokens, layer, t, s);
    }

    // Gradients of the queries; of X and G of the keys and of the step sizes, as far as the queries read them.
    void queries(const Place& at, const Weights<T>& now, const Gradients<T>& d) {
        const long length = at.tokens.length, from = at.tokens.first * p.width(), last = p.depth - 1;
        layer_norm(at, d);
        for (long l = last; l >= 0; l--) {
            const long in = p.inputs(l), out = p.outputs(l);
            T *x = of_queries(inputs, l, length, in), *d_z = of_queries(outputs, l, length, out);
            T *product_of = products + l * p.size * p.size, *eta = d_eta;
            if (l < last)
                for (long i = 0; i < length * out; i++) d_z[i] = d_x[i] * query_slopes[l][i];
            // z = x W + b - (eta * (x X^T + 1)) G
            each_with_each<T>(turned, length, out, d_z, grads(l, length), d_steps);
            for (long i = 0; i < length * length; i++) {
                d_steps[i] = -d_steps[i];
                eta[i] += T(p.factors[l]) * d_steps[i] * product_of[i];
            }
            times_eta(at, l, product_of, steps);
            std::memset(d_grads[l], 0, length * out * sizeof(T));
            product<Into::subtract, T>(length, out, length, transposed<T>(steps, length), d_z, out, d_grads[l], out);
            times_eta(at, l, d_steps, steps);
            product<Into::set, T>(length, in, length, transposed<T>(steps, length), x, in, d_inputs[l], in);
            back_through<T>(turned, length, in, out, now.weight[l], d_z, d_x);
            product<Into::add, T>(length, in, length, plain<T>(steps, length), inputs[l], in, d_x, in);
        }
        for (long i = 0; i < length * p.width(); i++) d.q[from + i] = d_x[i] + d.out[from + i];
    }

    // Through q + LN(z): dZ of the queries of the last layer.
    void layer_norm(const Place& at, const Gradients<T>& d) {
        const long width = p.width(), length = at.tokens.length;
        const T* weight = p.norm_weight + at.net * width;
        T *d_weight = d.norm_weight + at.net * width, *d_bias = d.norm_bias + at.net * width;
        T *to = of_queries(outputs, p.depth - 1, length, width), *normed = d_x, *d_normed = d_scaled;
        for (long t = 0; t < length; t++) {
            const T* d_out = d.out + (at.tokens.first + t) * width;
            const T inverse = normalise(width, p.query_outputs + (at.tokens.first + t) * width, normed);
#pragma omp simd
            for (long i = 0; i < width; i++) {
                d_weight[i] += d_out[i] * normed[i];
                d_bias[i] += d_out[i];
                d_normed[i] = d_out[i] * weight[i];
            }
            through_normed(width, d_normed, normed, inverse, to + t * width);
        }
    }

    // Gradients of the keys and targets, of the weights before the mini-batch from those after it.
    void keys(const Place& at, const Weights<T>& now, const Weights<T>& d_now, const Gradients<T>& d) {
        const long length = at.tokens.length, width = p.width(), from = at.tokens.first * width;
        for (long l = 0; l < p.depth; l++) updates(at, l, d_now);
        for (long l = 0; l + 1 < p.depth; l++) {
            const long out = p.outputs(l), next = p.outputs(l + 1);
            T *through = d_through(l, length), *slope = slopes[l];
            for (long i = 0; i < length * out; i++) through[i] = d_grads[l][i] * slope[i];
            product<Into::add, T>(length, next, out, plain(through, out), now.weight[l + 1], next, d_grads[l + 1],
                                  next);
        }
        const long last = p.depth - 1;
        loss.backward(at.net, length, grads(last, length), d_grads[last], outputs[last], d.target + from,
                      d.norm_weight + at.net * width, d.norm_bias + at.net * width);
        for (long l = last; l >= 0; l--) {
            const long in = p.inputs(l), out = p.outputs(l);
            transpose<T>(length, out, outputs[l], out, turned.in, length);
            product<Into::subtract, T>(in, length, out, plain(now.weight[l], out), turned.in, length,
                                       d_inputs_turned[l], length);
            transpose<T>(in, length, d_inputs_turned[l], length, turned.out, in);
            add<T>(length * in, turned.out, d_inputs[l], -1);
            if (l > 0) {
                T *d_z = outputs[l - 1], *slope = slopes[l - 1], *curve = curves[l - 1];
                for (long i = 0; i < length * in; i++)
                    d_z[i] = d_inputs[l][i] * slope[i] + d_grads[l - 1][i] * curve[i];
            }
            const long rows = l > 0 ? 3 * length : 2 * length;
            product<Into::add, T>(in, out, rows, transposed<T>(inputs[l], in), outputs[l], out, d_now.weight[l], out);
            for (long r = 0; r < 2 * length; r++) add<T>(out, outputs[l] + r * out, d_now.bias[l]);
        }
        std::memcpy(d.k + from, d_inputs[0], length * width * sizeof(T));
    }

    // Through W' = W - X^T (step G), b' = b - sum(step G).
    void updates(const Place& at, long l, const Weights<T>& d_now) {
        const long length = at.tokens.length, in = p.inputs(l), out = p.outputs(l);
        transpose<T>(length, out, scaled[l], out, turned.in, length);
        product<Into::set, T>(in, length, out, plain(d_now.weight[l], out), turned.in, length, d_inputs_turned[l],
                              length);
        affine<T>(length, in, out, inputs[l], d_now.weight[l], d_now.bias[l], d_scaled);
        for (long s = 0; s < length; s++) {
            const T step = step_size(p, at.tokens, l, length - 1, s);
            add<T>(out, d_scaled + s * out, d_grads[l] + s * out, -step);
            d_eta[(length - 1) * length + s] -=
                T(p.factors[l]) * dot<T>(out, d_scaled + s * out, grads(l, length) + s * out);
        }
    }

    // Of the learning rates and of the step scales.
    void rates(const Place& at, const Gradients<T>& d) {
        const long length = at.tokens.length;
        T* d_scale = d.scale + at.net * p.size * p.size;
        std::memset(d.lr + at.tokens.first, 0, length * sizeof(T));
        for (long t = 0; t < length; t++)
            for (long s = 0; s < length; s++) {
                d.lr[at.tokens.first + s] += d_eta[t * length + s] * p.scale[t * p.size + s];
                d_scale[t * p.size + s] += d_eta[t * length + s] * at.tokens.lr[s];
            }
    }
};

}  // namespace ttt
