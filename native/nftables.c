/* Build: gcc -shared -fPIC … -Wl,-soname,libnftables.so.1 -Wl,--version-script=native/nftables.map (setup.py does it)
 *
 * In bundles it is `libnftables.so.1`. CRIU is linked against that to lock connections, which our own eBPF program does, and
 * to save network namespaces, which stay. Loading it and the five libraries that it needs would take 0.5 ms of every wake.
 *
 * It guarantees: whoever asks whether rules can be set is told that they can't. A CRIU that calls another of its functions
 * ends ("undefined symbol"), and one that can't start with this library is given the real one (bundle.py).
 */
#include <stdint.h>
#include <stdio.h>

static struct nft_ctx {
	char unused;
} only;

struct nft_ctx *nft_ctx_new(uint32_t flags)
{
	(void)flags;
	return &only;
}

void nft_ctx_free(struct nft_ctx *context)
{
	(void)context;
}

int nft_ctx_buffer_output(struct nft_ctx *context)
{
	(void)context;
	return 0;
}

int nft_ctx_buffer_error(struct nft_ctx *context)
{
	(void)context;
	return 0;
}

FILE *nft_ctx_set_output(struct nft_ctx *context, FILE *file)
{
	(void)context;
	(void)file;
	return NULL;
}

FILE *nft_ctx_set_error(struct nft_ctx *context, FILE *file)
{
	(void)context;
	(void)file;
	return NULL;
}

const char *nft_ctx_get_error_buffer(struct nft_ctx *context)
{
	(void)context;
	return "criproxy's CRIU has no nftables";
}

int nft_run_cmd_from_buffer(struct nft_ctx *context, const char *command)
{
	(void)context;
	(void)command;
	return -1;
}
