/* Modules and launches of the stub. A cubin is the text "STUB name letters": the function of that name takes arguments
 * of 8 (p, l) and 4 (i, f) bytes. A launch writes what it was given to its first argument, an address, as words of 8
 * bytes: grid, threads, shared memory, whether it may begin before the kernel before it ends, then all arguments. */

#include "stub_state.h"

enum { MAX_SHARED = 8, CARVEOUT = 9, SERIALIZATION = 6, LEAST_SHARED = 48 * 1024, MOST_SHARED = 99 * 1024, WORDS_BEFORE = 6 };
struct launch_attribute { /* CUlaunchAttribute */
    int id, pad;
    union {
        int allowed;
        char size[64];
    } value;
};
struct launch_config { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream;
    struct launch_attribute *attributes;
    unsigned n_attributes;
};

static int cuModuleLoadData(void **module, const void *image) {
    ENTER_CONTEXT();
    if (strncmp(image, "STUB ", 5)) return INVALID_IMAGE;
    struct object *made = *module = make(MODULE);
    made->memory = strdup((const char *)image + 5);
    made->size = LEAST_SHARED;
    return OK;
}

static int cuModuleUnload(void *module) {
    ENTER_CONTEXT();
    return destroy(MODULE, module);
}

static int cuModuleGetFunction(void **function, void *handle, const char *name) {
    ENTER_CONTEXT();
    struct object *module = find(MODULE, handle);
    size_t length = strlen(name);
    if (!module) return INVALID_HANDLE;
    if (strncmp(module->memory, name, length) || module->memory[length] != ' ') return NOT_FOUND;
    *function = module;
    return OK;
}

static int cuFuncSetAttribute(void *function, int attribute, int value) {
    ENTER_CONTEXT();
    struct object *module = find(MODULE, function);
    if (!module) return INVALID_HANDLE;
    if (attribute == CARVEOUT) return value < -1 || value > 100 ? INVALID_VALUE : OK;
    if (attribute != MAX_SHARED || value < 0 || value > MOST_SHARED) return INVALID_VALUE;
    module->size = (size_t)value;
    return OK;
}

static int cuLaunchKernelEx(const struct launch_config *config, void *function, void **arguments, void **extra) {
    ENTER_CONTEXT();
    struct object *module = find(MODULE, function);
    if (!module) return INVALID_HANDLE;
    if (extra || config->shared > module->size || config->n_attributes > 1) return INVALID_VALUE;
    struct node n = {.op = LAUNCH, .to = DEVICE, .height = 1};
    for (int i = 0; i < 3; i++) {
        if (!config->grid[i] || !config->block[i]) return INVALID_VALUE;
        n.words[i] = config->grid[i];
    }
    n.words[3] = config->block[0] * config->block[1] * config->block[2];
    n.words[4] = config->shared;
    for (unsigned i = 0; i < config->n_attributes; i++) {
        if (config->attributes[i].id != SERIALIZATION) return INVALID_VALUE;
        n.words[5] = (unsigned)config->attributes[i].value.allowed;
    }
    int count = WORDS_BEFORE;
    for (const char *letter = strchr(module->memory, ' ') + 1; *letter; letter++, count++)
        memcpy(&n.words[count], arguments[count - WORDS_BEFORE], strchr("pl", *letter) ? 8 : 4);
    n.dst = n.words[WORDS_BEFORE];
    n.width = sizeof(address) * (size_t)count;
    return submit(config->stream, n);
}
