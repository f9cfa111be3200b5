// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU's edu device (QEMU docs/specs/edu.rst): it moves up to 4 KiB between the bus and a buffer of
 * its own, a tenth of a second each way. It is not told of what an IOMMU refuses.
 */

#include <linux/io-64-nonatomic-lo-hi.h>
#include <linux/iopoll.h>

#include "engine.h"

#define EDU_SOURCE	0x80
#define EDU_TARGET	0x88
#define EDU_COUNT	0x90
#define EDU_COMMAND	0x98
#define EDU_RUN		BIT(0)
#define EDU_TO_BUS	BIT(1)
#define EDU_BUFFER	0x40000

#define POLL_US		2000
#define TIMEOUT_US	(20 * USEC_PER_SEC)

static int settle(struct engine *engine)
{
	u32 command;

	return readl_poll_timeout(engine->registers + EDU_COMMAND, command, !(command & EDU_RUN),
				  POLL_US, TIMEOUT_US);
}

static void start(struct engine *engine, u64 source, u64 target, size_t size, u64 direction)
{
	writeq(source, engine->registers + EDU_SOURCE);
	writeq(target, engine->registers + EDU_TARGET);
	writeq(size, engine->registers + EDU_COUNT);
	writeq(EDU_RUN | direction, engine->registers + EDU_COMMAND);
}

static int move(struct engine *engine, u64 source, u64 target, size_t size, u64 direction)
{
	start(engine, source, target, size, direction);
	return settle(engine);
}

static int edu_copy(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size)
{
	int error = move(engine, from, EDU_BUFFER, size, 0);

	return error ?: move(engine, EDU_BUFFER, to, size, EDU_TO_BUS);
}

static int edu_begin(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size)
{
	int error = move(engine, from, EDU_BUFFER, size, 0);

	if (!error)
		start(engine, EDU_BUFFER, to, size, EDU_TO_BUS);
	return error;
}

/*
 * It writes at the end of its tenth of a second, just before it says that it is done. Looked at
 * without a pause: one may last two ticks (8 ms) where timers are coarse.
 */
static int edu_finish(struct engine *engine)
{
	u32 command;

	return readl_poll_timeout(engine->registers + EDU_COMMAND, command, !(command & EDU_RUN),
				  0, TIMEOUT_US);
}

static void edu_stop(struct engine *engine)
{
	settle(engine);
}

const struct engine_kind edu_kind = {
	.vendor = 0x1234,
	.device = 0x11e8,
	.start = settle,
	.stop = edu_stop,
	.copy = edu_copy,
	.begin = edu_begin,
	.finish = edu_finish,
};
