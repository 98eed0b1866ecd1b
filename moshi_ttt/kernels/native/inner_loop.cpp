// The inner loop of a TTT layer on the CPU, of any depth: `moshi_ttt/dual_form.py` by hand.
//
// A net goes through all its mini-batches before the next one does: its weights, and in the backward pass
// their gradients, stay in a core's cache. Threads share the nets, which do not know of each other.

#include <atomic>
#include <thread>

#include "backward.h"
#include "forward.h"
#include "step.h"

namespace ttt {

// What a thread must have to do before it is worth starting: some 0.1 ms.
constexpr double FLOPS_OF_A_THREAD = 1e7;

// Work on all nets, each thread with a Worker of its own. `products` is how often the work goes over all inner
// weights for a token.
template <class Worker, class T, class Work>
void share(const Problem<T>& p, double products, Work work) {
    const double flops = 2 * products * p.nets * p.weights();
    const long useful = 1 + long(flops / FLOPS_OF_A_THREAD), threads = std::min({p.threads, p.nets, useful});
    std::atomic<long> next{0};
    auto run = [&] {
        Worker worker(p);
        for (long net = next++; net < p.nets; net = next++) work(worker, net);
    };
    std::vector<std::thread> others;
    for (long i = 1; i < threads; i++) others.emplace_back(run);
    run();
    for (std::thread& other : others) other.join();
}

template <class T>
void forward(const Problem<T>* p, T* const* state, T* out) {
    share<Forward<T>>(*p, 3.5 * p->tokens, [&](Forward<T>& worker, long net) { worker.net(net, state, out); });
}

template <class T>
void backward(const Problem<T>* p, const Gradients<T>* d) {
    share<Backward<T>>(*p, 10.5 * p->tokens, [&](Backward<T>& worker, long net) { worker.net(net, *d); });
}

template <class T>
void step(const Problem<T>* p, T* const* state, const Pending<T>* pending, T* out) {
    share<Step<T>>(*p, 2.5, [&](Step<T>& worker, long net) { worker.net(net, state, *pending, out); });
}

template <class T>
void finish(const Problem<T>* p, T* const* state, const Pending<T>* pending) {
    share<Step<T>>(*p, p->size, [&](Step<T>& worker, long net) { worker.finish(net, state, *pending); });
}

}  // namespace ttt

// What Python calls, for float and double.
#define TTT_FUNCTIONS(T, NAME)                                                                                \
    void forward_##NAME(const ttt::Problem<T>* p, T* const* state, T* out) { ttt::forward(p, state, out); }   \
    void backward_##NAME(const ttt::Problem<T>* p, const ttt::Gradients<T>* d) { ttt::backward(p, d); }       \
    void step_##NAME(const ttt::Problem<T>* p, T* const* state, const ttt::Pending<T>* pending, T* out) {     \
        ttt::step(p, state, pending, out);                                                                    \
    }                                                                                                         \
    void finish_##NAME(const ttt::Problem<T>* p, T* const* state, const ttt::Pending<T>* pending) {           \
        ttt::finish(p, state, pending);                                                                       \
    }

extern "C" {
TTT_FUNCTIONS(float, float32)
TTT_FUNCTIONS(double, float64)
}
