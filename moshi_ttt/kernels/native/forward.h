// Outputs of one net's sequence, and the weights after it.

#pragma once

#include "net.h"

namespace ttt {

template <class T>
class Forward {
   public:
    explicit Forward(const Problem<T>& p)
        : p(p),
          turned(p),
          inputs(layers_of(p, p.size, 0)),
          queries(layers_of(p, p.size, 0)),
          outputs(layers_of(p, p.size, 1)),
          slopes(layers_of(p, p.size, 1)),
          grads(layers_of(p, p.size, 1)),
          steps(p.size * p.size),
          normed(p.width()),
          reach(p.depth) {}

    // `state` becomes the weights after the sequence. The weights that a group of mini-batches starts with are
    // written to `p.starts`, but for those of the first, which were given.
    void net(long index, T* const* state, T* out) {
        const Weights<T> now(p, state, index);
        std::fill(reach.begin(), reach.end(), INFINITY);
        for (long m = 0; m < p.mini_batches(); m++) {
            if (p.starts && m > 0 && m % p.group == 0)
                copy_weights(p, now, Weights<T>(p, p.starts + m / p.group * 2 * p.depth, index));
            const Tokens<T> tokens(p, index, m);
            keys(index, tokens, now);
            answer(index, tokens, now, out + tokens.first * p.width());
            for (long l = 0; l < p.depth; l++) update(index, m, tokens, l, now);
        }
    }

   private:
    const Problem<T>& p;
    const Turned<T> turned;
    const std::vector<Buffer<T>> inputs, queries, outputs, slopes, grads;
    const Buffer<T> steps, normed;
    std::vector<double> reach;  // no layer is further from the bound's center

    // X and G of each layer for the keys.
    void keys(long net, const Tokens<T>& tokens, const Weights<T>& now) {
        const long width = p.width(), last = p.depth - 1;
        std::memcpy(inputs[0], tokens.k, tokens.length * width * sizeof(T));
        for (long l = 0; l < p.depth; l++) {
            affine<T>(tokens.length, p.inputs(l), p.outputs(l), inputs[l], now.weight[l], now.bias[l], outputs[l]);
            if (!p.hidden(l)) break;
            T *gelu = inputs[l + 1], *slope = slopes[l];
            each<T>(tokens.length * p.outputs(l), outputs[l], [&](long i, long count, const Gelu<T>& here) {
                put<T>(gelu + i, count, here.value());
                put<T>(slope + i, count, here.slope());
            });
        }
        if (p.key_outputs)
            std::memcpy(p.key_outputs + tokens.first * width, outputs[last], tokens.length * width * sizeof(T));
        for (long s = 0; s < tokens.length; s++)
            loss_gradient<T>(p, net, outputs[last] + s * width, tokens.target + s * width, normed,
                             grads[last] + s * width);
        for (long l = last - 1; l >= 0; l--) {
            back_through<T>(turned, tokens.length, p.outputs(l), p.outputs(l + 1), now.weight[l + 1], grads[l + 1],
                            grads[l]);
            T *grad = grads[l], *slope = slopes[l];
#pragma omp simd
            for (long i = 0; i < tokens.length * p.outputs(l); i++) grad[i] *= slope[i];
        }
    }

    // Each query with its own weights, none of which are formed.
    void answer(long net, const Tokens<T>& tokens, const Weights<T>& now, T* out) {
        const long length = tokens.length, width = p.width(), last = p.depth - 1;
        std::memcpy(queries[0], tokens.q, length * width * sizeof(T));
        for (long l = 0; l < p.depth; l++) {
            each_with_each<T>(turned, length, p.inputs(l), queries[l], inputs[l], steps);
            for (long t = 0; t < length; t++)
                for (long s = 0; s < length; s++)
                    steps[t * length + s] = (steps[t * length + s] + 1) * step_size(p, tokens, l, t, s);
            affine<T>(length, p.inputs(l), p.outputs(l), queries[l], now.weight[l], now.bias[l], outputs[l]);
            product<Into::subtract, T>(length, p.outputs(l), length, plain<T>(steps, length), grads[l],
                                       p.outputs(l), outputs[l], p.outputs(l));
            if (!p.hidden(l)) break;
            T* gelu = queries[l + 1];
            each<T>(length * p.outputs(l), outputs[l],
                    [&](long i, long count, const Gelu<T>& here) { put<T>(gelu + i, count, here.value()); });
        }
        if (p.query_outputs)
            std::memcpy(p.query_outputs + tokens.first * width, outputs[last], length * width * sizeof(T));
        const T *weight = p.norm_weight + net * width, *bias = p.norm_bias + net * width;
        for (long t = 0; t < length; t++) {
            normalise<T>(width, outputs[last] + t * width, normed);
            for (long i = 0; i < width; i++)
                out[t * width + i] = tokens.q[t * width + i] + (bias[i] + normed[i] * weight[i]);
        }
    }

    // The weights of one layer after the mini-batch.
    void update(long net, long mini_batch, const Tokens<T>& tokens, long layer, const Weights<T>& now) {
        const long in = p.inputs(layer), out = p.outputs(layer);
        if (p.radii)
            for (long s = 0; s < tokens.length; s++) {
                const T *x = inputs[layer] + s * in, *g = grads[layer] + s * out;
                const double step = std::abs(step_size(p, tokens, layer, tokens.length - 1, s));
                reach[layer] += step * std::sqrt((dot(in, x, x) + 1.0) * dot(out, g, g));
            }
        scale_grads<T>(p, tokens, layer, grads[layer], grads[layer]);
        fold<Into::subtract, T>(p, layer, tokens.length, inputs[layer], grads[layer], now);
        if (p.radii) bound(net, mini_batch, layer, now);
    }

    // Draw the weights back to the surface of the ball where they are outside. Only where the lengths of the
    // updates since the last look allow that they are, the weights are looked at.
    void bound(long net, long mini_batch, long layer, const Weights<T>& now) {
        const double radius = p.radii[layer];
        T shrink = 1;
        if (!(reach[layer] < 0.999 * radius)) {
            const Weights<T> center(p, p.center, net % p.heads);
            reach[layer] = std::sqrt(square_distance(p, layer, now, center));
            if (reach[layer] > radius) {
                shrink = radius / reach[layer];
                draw(p, layer, now, center, shrink);
                reach[layer] = radius;
            }
        }
        if (p.shrinks) p.shrinks[(mini_batch * p.nets + net) * p.depth + layer] = shrink;
    }
};

}  // namespace ttt
