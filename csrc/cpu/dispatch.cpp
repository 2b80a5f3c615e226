#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/cpu_features.h"

namespace cocoop_fast {

extern const Kernels kernels_portable;
#ifdef COCOOP_FAST_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef COCOOP_FAST_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef COCOOP_FAST_HAVE_NEON
extern const Kernels kernels_neon;
#endif

static std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables{&kernels_portable};
#ifdef COCOOP_FAST_HAVE_AVX2
    if (cpu_features().runs_avx2()) tables.push_back(&kernels_avx2);
#endif
#ifdef COCOOP_FAST_HAVE_AVX512
    if (cpu_features().runs_avx512()) tables.push_back(&kernels_avx512);
#endif
#ifdef COCOOP_FAST_HAVE_NEON
    if (cpu_features().runs_neon()) tables.push_back(&kernels_neon);
#endif
    return tables;
}

static const Kernels* find(const std::string& name, const char* source) {
    std::string names;
    for (const Kernels* table : runnable()) {
        if (name == table->name) return table;
        names += (names.empty() ? "" : ", ") + std::string(table->name);
    }
    throw std::invalid_argument(std::string(source) + " must be one of " + names + " on this machine, got '" + name +
                                "'");
}

static std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
    if (const Kernels* table = chosen.load()) return *table;
    const char* variable = std::getenv("COCOOP_FAST_ISA");
    const bool given = variable != nullptr && *variable != '\0';
    const Kernels* table = given ? find(variable, "COCOOP_FAST_ISA") : runnable().back();
    const Kernels* none = nullptr;
    chosen.compare_exchange_strong(none, table);
    return *chosen.load();
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : runnable()) names.push_back(table->name);
    return names;
}

void set_isa(const std::string& name) { chosen.store(find(name, "`isa`")); }

}  // namespace cocoop_fast
