// SPDX-License-Identifier: GPL-2.0-only
/*
 * The project's GPU model (docs/gpu-model.md): commands in a ring, a fence when one is done. It is
 * told when an access is refused, and halts.
 */

#include <linux/delay.h>
#include <linux/jiffies.h>

#include "engine.h"

#define IDENTITY	0x000
#define CONTROL		0x020
#define STATUS		0x024
#define RESET		0x028
#define RING_BASE_LOW	0x040
#define RING_BASE_HIGH	0x044
#define RING_APERTURE	0x048
#define RING_ENTRIES	0x04c
#define DOORBELL_TAIL	0x1000

#define IS_GPU		0x55504756
#define ENABLE		1
#define HALTED		BIT(2)
#define GONE		0xffffffff
#define VRAM		0	/* aperture: offsets in its own video memory */
#define SYSTEM		1	/* aperture: bus addresses */
#define OPCODE_COPY	1
#define FLAG_FENCE	1

#define ENTRIES		16
#define FENCE_AT	2048	/* in the scratch page, behind the ring */
#define TIMEOUT_MS	20000

struct gpu_command {
	u8 opcode, flags, source_aperture, target_aperture, fence_aperture, reserved;
	__le16 reserved2;
	__le64 source, target, size;
	__le32 source_pitch, target_pitch, rows, fence_value;
	__le64 value, fence_address;
};
static_assert(sizeof(struct gpu_command) == 64);

static int gpu_start(struct engine *engine)
{
	if (readl(engine->registers + IDENTITY) != IS_GPU)
		return -ENODEV;
	writel(1, engine->registers + RESET);
	writel(lower_32_bits(engine->scratch_at), engine->registers + RING_BASE_LOW);
	writel(upper_32_bits(engine->scratch_at), engine->registers + RING_BASE_HIGH);
	writel(SYSTEM, engine->registers + RING_APERTURE);
	writel(ENTRIES, engine->registers + RING_ENTRIES);
	writel(ENABLE, engine->registers + CONTROL);
	engine->tail = 0;
	return 0;
}

static void gpu_stop(struct engine *engine)
{
	writel(0, engine->registers + CONTROL);
	writel(1, engine->registers + RESET);
}

static int run(struct engine *engine, u8 source_aperture, u64 from, u8 target_aperture, u64 to,
	       size_t size)
{
	struct gpu_command *command = (struct gpu_command *)engine->scratch + engine->tail;
	__le32 *fence = engine->scratch + FENCE_AT;
	unsigned long deadline = jiffies + msecs_to_jiffies(TIMEOUT_MS);
	int error = 0;

	*command = (struct gpu_command){
		.opcode = OPCODE_COPY,
		.flags = FLAG_FENCE,
		.source_aperture = source_aperture,
		.target_aperture = target_aperture,
		.fence_aperture = SYSTEM,
		.source = cpu_to_le64(from),
		.target = cpu_to_le64(to),
		.size = cpu_to_le64(size),
		.fence_value = cpu_to_le32(++engine->fence),
		.fence_address = cpu_to_le64(engine->scratch_at + FENCE_AT),
	};
	engine->tail = (engine->tail + 1) % ENTRIES;
	writel(engine->tail, engine->registers + DOORBELL_TAIL);
	while (le32_to_cpu(READ_ONCE(*fence)) != engine->fence) {
		u32 status = readl(engine->registers + STATUS);

		if (status == GONE)
			return -ENODEV;
		if (status & HALTED)
			error = -EIO;
		else if (time_after(jiffies, deadline))
			error = -ETIMEDOUT;
		if (error) {
			gpu_start(engine);
			break;
		}
		usleep_range(200, 500);
	}
	return error;
}

static int gpu_copy(struct engine *engine, dma_addr_t from, dma_addr_t to, size_t size)
{
	return run(engine, SYSTEM, from, SYSTEM, to, size);
}

static int gpu_copy_local(struct engine *engine, bool to_local, u64 local, dma_addr_t bus,
			  size_t size)
{
	if (to_local)
		return run(engine, SYSTEM, bus, VRAM, local, size);
	return run(engine, VRAM, local, SYSTEM, bus, size);
}

const struct engine_kind gpu_model_kind = {
	.vendor = 0x1234,
	.device = 0xa9e0,
	.start = gpu_start,
	.stop = gpu_stop,
	.copy = gpu_copy,
	.copy_local = gpu_copy_local,
};
