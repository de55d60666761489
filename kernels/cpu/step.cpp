// One token of every sequence of a batch through a whole model, of any generation.
#include "step4.h"
#include "step56.h"
#include "step7.h"

using namespace rwkv_lab;

// Logits [B,V] and the new state.
extern "C" int64_t step(const Model *model, const Call *call) {
    const Model &m = *model;
    const Call &c = *call;
    switch (m.generation) {
        case 4: return step4::fit(m, c) ? (step4::step(m, c), FITS) : MISFIT;
        case 5:
        case 6: return step56::fit(m, c) ? (step56::step(m, c), FITS) : MISFIT;
        case 7: return step7::fit(m, c) ? (step7::step(m, c), FITS) : MISFIT;
        default: return MISFIT;
    }
}
