// A plugin of qemu-user that counts what a program executes: for each translated block its executions and its instruction
// words, as "ADDRESS EXECUTIONS WORD WORD …" in hexadecimal, written at the program's end to the file `out=FILE`.
//
//   gcc -O2 -shared -fPIC count.c -o count.so
//   qemu-aarch64 -cpu cortex-a76 -plugin ./count.so,out=FILE PROGRAM
//
// Declares the few functions of qemu's plugin interface, version 1 (qemu 7.2 as in Debian 12), that it needs; Debian ships
// no header. https://www.qemu.org/docs/master/devel/tcg-plugins.html
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
typedef uint64_t plugin_id;
struct block;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*f)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *tb, int op, void *counter, uint64_t value);
void qemu_plugin_register_atexit_cb(plugin_id id, void (*f)(plugin_id, void *), void *data);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *insn);

struct block {
    struct block *next;
    uint64_t address, executions;
    size_t n;
    uint32_t words[];
};

static struct block *blocks;
static char *path;

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
    size_t n = qemu_plugin_tb_n_insns(tb);
    struct block *b = calloc(1, sizeof *b + n * sizeof *b->words);
    if (!b)
        abort();
    b->address = qemu_plugin_tb_vaddr(tb);
    b->n = n;
    for (size_t i = 0; i < n; i++)
        memcpy(&b->words[i], qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
    b->next = blocks;
    blocks = b;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, 0 /* add */, &b->executions, 1);
}

static void finished(plugin_id id, void *data)
{
    FILE *f = fopen(path, "w");
    if (!f) {
        perror(path);
        abort();
    }
    for (struct block *b = blocks; b; b = b->next) {
        if (!b->executions)
            continue;
        fprintf(f, "%lx %lx", (unsigned long)b->address, (unsigned long)b->executions);
        for (size_t i = 0; i < b->n; i++)
            fprintf(f, " %x", b->words[i]);
        fputc('\n', f);
    }
    if (fclose(f)) {
        perror(path);
        abort();
    }
}

EXPORT int qemu_plugin_version = 1;

EXPORT int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    if (argc != 1 || strncmp(argv[0], "out=", 4)) {
        fprintf(stderr, "count: expected out=FILE\n");
        return 1;
    }
    path = strdup(argv[0] + 4);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, finished, NULL);
    return 0;
}
