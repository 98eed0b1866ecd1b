// One net and one of its mini-batches: what the forward pass and the backward pass have in common.
// The maths is in `moshi_ttt/inner_loop.py`, and so are the names.

#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "pointwise.h"
#include "problem.h"

namespace ttt {

template <class T>
class Buffer {
   public:
    explicit Buffer(long count = 0) : at_(nullptr, std::free) {
        const long bytes = (count * long(sizeof(T)) + 63) / 64 * 64;
        if (bytes > 0) at_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
        if (bytes > 0 && !at_) throw std::bad_alloc();
    }
    operator T*() const { return at_.get(); }

   private:
    std::unique_ptr<T, void (*)(void*)> at_;
};

// A buffer for each layer: `rows` of as many numbers as the layer has inputs, or outputs.
template <class T>
std::vector<Buffer<T>> layers_of(const Problem<T>& p, long rows, long after) {
    std::vector<Buffer<T>> found;
    for (long l = 0; l < p.depth; l++) found.emplace_back(rows * p.widths[l + after]);
    return found;
}

// The tokens of one mini-batch of one net.
template <class T>
struct Tokens {
    long first, length;  // `first` counts from the first token of the first net
    const T *q, *k, *target, *lr;

    Tokens(const Problem<T>& p, long net, long mini_batch)
        : first(net * p.tokens + mini_batch * p.size), length(std::min(p.size, p.tokens - mini_batch * p.size)) {
        q = p.q + first * p.width(), k = p.k + first * p.width(), target = p.target + first * p.width();
        lr = p.lr + first;
    }
};

// Weights and biases of one net.
template <class T>
struct Weights {
    std::vector<T*> weight, bias;

    Weights(const Problem<T>& p, T* const* list, long net) {
        for (long l = 0; l < p.depth; l++) {
            weight.push_back(list[l] + net * p.inputs(l) * p.outputs(l));
            bias.push_back(list[p.depth + l] + net * p.outputs(l));
        }
    }
};

template <class T>
void copy_weights(const Problem<T>& p, const Weights<T>& from, const Weights<T>& to) {
    for (long l = 0; l < p.depth; l++) {
        std::memcpy(to.weight[l], from.weight[l], p.inputs(l) * p.outputs(l) * sizeof(T));
        std::memcpy(to.bias[l], from.bias[l], p.outputs(l) * sizeof(T));
    }
}

// Room for the weights and biases of one net.
template <class T>
class OwnWeights {
   public:
    explicit OwnWeights(const Problem<T>& p) {
        for (long l = 0; l < p.depth; l++) numbers.emplace_back(p.inputs(l) * p.outputs(l));
        for (long l = 0; l < p.depth; l++) numbers.emplace_back(p.outputs(l));
    }
    Weights<T> weights(const Problem<T>& p) const {
        const std::vector<T*> list(numbers.begin(), numbers.end());
        return Weights<T>(p, list.data(), 0);
    }

   private:
    std::vector<Buffer<T>> numbers;
};

// to += factor * from.
template <class T>
inline void add(long count, const T* from, T* to, T factor = 1) {
#pragma omp simd
    for (long i = 0; i < count; i++) to[i] += factor * from[i];
}

// out = x W + b.
template <class T>
void affine(long rows, long inputs, long outputs, const T* x, const T* weight, const T* bias, T* out) {
    for (long r = 0; r < rows; r++) std::memcpy(out + r * outputs, bias, outputs * sizeof(T));
    product<Into::add>(rows, outputs, inputs, plain(x, inputs), weight, outputs, out, outputs);
}

// Room for a product with a transposed matrix, whose columns are the tokens.
template <class T>
struct Turned {
    Buffer<T> in, out;
    explicit Turned(const Problem<T>& p) : in(p.size * p.widest()), out(p.size * p.widest()) {}
};

// to = x W^T, of W [inputs, outputs] and x [rows, outputs].
template <class T>
void back_through(const Turned<T>& room, long rows, long inputs, long outputs, const T* weight, const T* x,
                  T* to) {
    transpose<T>(rows, outputs, x, outputs, room.in, rows);
    product<Into::set, T>(inputs, rows, outputs, plain(weight, outputs), room.in, rows, room.out, rows);
    transpose<T>(inputs, rows, room.out, rows, to, inputs);
}

// to = a b^T, of [rows, width] each.
template <class T>
void each_with_each(const Turned<T>& room, long rows, long width, const T* a, const T* b, T* to) {
    transpose<T>(rows, width, b, width, room.in, rows);
    product<Into::set, T>(rows, rows, width, plain(a, width), room.in, rows, to, rows);
}

// The step size of token s in the weights of token t.
template <class T>
inline T step_size(const Problem<T>& p, const Tokens<T>& tokens, long layer, long t, long s) {
    return T(p.factors[layer]) * p.scale[t * p.size + s] * tokens.lr[s];
}

// G of the last layer for one token.
template <class T>
void loss_gradient(const Problem<T>& p, long net, const T* z, const T* target, T* normed, T* grad) {
    const long width = p.width();
    const T *weight = p.norm_weight + net * width, *bias = p.norm_bias + net * width;
    const T inverse = normalise(width, z, normed);
#pragma omp simd
    for (long i = 0; i < width; i++) grad[i] = (weight[i] * normed[i] + bias[i] - target[i]) * weight[i];
    through_normed(width, grad, normed, inverse, grad);
}

// G times the step sizes that the weights after the mini-batch are made with.
template <class T>
void scale_grads(const Problem<T>& p, const Tokens<T>& tokens, long layer, const T* grads, T* scaled) {
    const long width = p.outputs(layer);
    for (long s = 0; s < tokens.length; s++) {
        const T step = step_size(p, tokens, layer, tokens.length - 1, s);
#pragma omp simd
        for (long i = 0; i < width; i++) scaled[s * width + i] = step * grads[s * width + i];
    }
}

// W -= X^T (step G) and b -= sum(step G), or what undoes it.
template <Into INTO, class T>
void fold(const Problem<T>& p, long layer, long length, const T* inputs, const T* scaled, const Weights<T>& now) {
    const long in = p.inputs(layer), out = p.outputs(layer);
    product<INTO>(in, out, length, transposed(inputs, in), scaled, out, now.weight[layer], out);
    for (long s = 0; s < length; s++)
        add(out, scaled + s * out, now.bias[layer], T(INTO == Into::add ? 1 : -1));
}

// Over the numbers of a layer's weight, then its bias: `work(at, center, count, offset)`, a row at a time.
template <class T, class Work>
void rows_of_layer(const Problem<T>& p, long layer, const Weights<T>& now, const Weights<T>& center, Work work) {
    const long width = p.outputs(layer);
    for (long r = 0; r < p.inputs(layer); r++)
        work(now.weight[layer] + r * width, center.weight[layer] + r * width, width);
    work(now.bias[layer], center.bias[layer], width);
}

// Square of a layer's distance from the bound's center.
template <class T>
double square_distance(const Problem<T>& p, long layer, const Weights<T>& now, const Weights<T>& center) {
    double square = 0;
    rows_of_layer(p, layer, now, center, [&](const T* at, const T* from, long count) {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < count; i++) sum += (at[i] - from[i]) * (at[i] - from[i]);
        square += sum;
    });
    return square;
}

// W = center + factor (W - center).
template <class T>
void draw(const Problem<T>& p, long layer, const Weights<T>& now, const Weights<T>& center, T factor) {
    rows_of_layer(p, layer, now, center, [&](T* at, const T* from, long count) {
#pragma omp simd
        for (long i = 0; i < count; i++) at[i] = from[i] + factor * (at[i] - from[i]);
    });
}

}  // namespace ttt
