// SPDX-License-Identifier: GPL-2.0-only
/*
 * Imports dma-bufs for a device that does DMA, with good manners and bad.
 *
 * Interface: open /dev/dmabuf_importer, write one command, read its answer; each open file imports
 * one buffer. At offset 0x100000 of the file are the 4 KiB of memory that the device copies from
 * and to.
 *
 *   attach FUNCTION FD WORD...		words: dynamic peer2peer revocable pinned ondemand
 *					stubborn hasty delay=MS mask=BITS (importer.h)
 *   map | unmap | detach
 *   show				the list that is mapped now, as map answers
 *   dma to|from OFFSET SIZE [stale]	the device copies into the buffer, or out of it
 *   late OFFSET SIZE US			the device writes, and US after it was told to, the buffer is
 *					unmapped; 0: it is not
 *   cpu to|from OFFSET SIZE pages|vmap	the CPU does
 *   fence MS				keep the buffer busy that long
 *   state
 *
 * A function is driven by this module through driver_override.
 */

#include <linux/module.h>

#include "importer.h"

static int parse_manners(struct manners *manners, int count, char **words)
{
	int i;

	*manners = (struct manners){ .mask = 64 };
	for (i = 0; i < count; i++) {
		if (!strcmp(words[i], "dynamic"))
			manners->dynamic = true;
		else if (!strcmp(words[i], "peer2peer"))
			manners->peer2peer = true;
		else if (!strcmp(words[i], "revocable"))
			manners->revocable = true;
		else if (!strcmp(words[i], "pinned"))
			manners->pinned = true;
		else if (!strcmp(words[i], "stubborn"))
			manners->stubborn = true;
		else if (!strcmp(words[i], "ondemand"))
			manners->ondemand = true;
		else if (!strcmp(words[i], "hasty"))
			manners->hasty = true;
		else if (sscanf(words[i], "delay=%u", &manners->delay_ms) != 1 &&
			 sscanf(words[i], "mask=%u", &manners->mask) != 1)
			return -EINVAL;
	}
	if (manners->mask < 12 || manners->mask > 64)
		return -EINVAL;
	/* Only a dynamic importer can say these of itself. */
	if ((manners->peer2peer || manners->revocable || manners->pinned) && !manners->dynamic)
		return -EINVAL;
	if (manners->ondemand && !manners->revocable)
		return -EINVAL;
	return 0;
}

static int do_attach(void *context, struct answer *answer, int count, char **words)
{
	struct import *import = context;
	struct manners manners;
	struct engine *engine;
	int fd;

	if (count < 2 || kstrtoint(words[1], 0, &fd) || parse_manners(&manners, count - 2, words + 2))
		return -EINVAL;
	if (import->attach)
		return -EBUSY;
	engine = named_data(words[0]);
	if (IS_ERR(engine))
		return PTR_ERR(engine);
	say_errno(answer, import_attach(import, engine, fd, &manners));
	return 0;
}

static int do_map(void *context, struct answer *answer, int count, char **words)
{
	struct import *import = context;
	int error = import_map(import);

	if (error)
		say_errno(answer, error);
	else
		import_say_table(import, answer);
	return 0;
}

static int do_show(void *context, struct answer *answer, int count, char **words)
{
	struct import *import = context;

	if (!import->attach)
		return -ENOTCONN;
	import_say_table(import, answer);
	return 0;
}

static int do_unmap(void *context, struct answer *answer, int count, char **words)
{
	import_unmap(context);
	say_errno(answer, 0);
	return 0;
}

static int do_detach(void *context, struct answer *answer, int count, char **words)
{
	import_detach(context);
	say_errno(answer, 0);
	return 0;
}

static int parse_copy(char **words, bool *to_buffer, u64 *offset, unsigned int *size)
{
	*to_buffer = !strcmp(words[0], "to");
	if (!*to_buffer && strcmp(words[0], "from"))
		return -EINVAL;
	if (kstrtou64(words[1], 0, offset) || kstrtouint(words[2], 0, size) || !*size ||
	    *size > BOUNCE_BYTES)
		return -EINVAL;
	return 0;
}

static int do_dma(void *context, struct answer *answer, int count, char **words)
{
	bool to_buffer, stale = count == 4 && !strcmp(words[3], "stale");
	unsigned int size;
	u64 offset;

	if ((count != 3 && !stale) || parse_copy(words, &to_buffer, &offset, &size))
		return -EINVAL;
	say_errno(answer, import_dma(context, to_buffer, offset, size, stale));
	return 0;
}

static int do_late(void *context, struct answer *answer, int count, char **words)
{
	unsigned int size, after_us;
	u64 offset, begun_ns = 0, late_ns = 0;
	int error;

	if (count != 3 || kstrtou64(words[0], 0, &offset) || kstrtouint(words[1], 0, &size) ||
	    !size || size > BOUNCE_BYTES || kstrtouint(words[2], 0, &after_us))
		return -EINVAL;
	error = import_late(context, offset, size, after_us, &begun_ns, &late_ns);
	say(answer, "begun_ns=%llu late_ns=%llu ", begun_ns, late_ns);
	say_errno(answer, error);
	return 0;
}

static int do_cpu(void *context, struct answer *answer, int count, char **words)
{
	unsigned int size;
	bool to_buffer;
	u64 offset;

	if (count != 4 || parse_copy(words, &to_buffer, &offset, &size))
		return -EINVAL;
	if (!strcmp(words[3], "pages"))
		say_errno(answer, import_cpu_pages(context, to_buffer, offset, size));
	else if (!strcmp(words[3], "vmap"))
		say_errno(answer, import_cpu_vmap(context, to_buffer, offset, size));
	else
		return -EINVAL;
	return 0;
}

static int do_fence(void *context, struct answer *answer, int count, char **words)
{
	unsigned int after_ms;

	if (count != 1 || kstrtouint(words[0], 0, &after_ms))
		return -EINVAL;
	say_errno(answer, import_fence(context, after_ms));
	return 0;
}

static int do_state(void *context, struct answer *answer, int count, char **words)
{
	struct import *import = context;

	say(answer, "attached=%d mapped=%d invalidated=%u map_ns=%llu unmap_ns=%llu ",
	    !!import->attach, !!READ_ONCE(import->table), import->invalidated, import->map_ns,
	    import->unmap_ns);
	say(answer, "pending=%d faults=%u fault_ns=%llu waited_ns=%llu\n", import->pending,
	    import->faults, import->fault_ns, import->waited_ns);
	return 0;
}

static const struct command commands[] = {
	{ "attach", do_attach },
	{ "map", do_map },
	{ "show", do_show },
	{ "unmap", do_unmap },
	{ "detach", do_detach },
	{ "dma", do_dma },
	{ "late", do_late },
	{ "cpu", do_cpu },
	{ "fence", do_fence },
	{ "state", do_state },
	{},
};

static void open(void *context)
{
	import_init(context);
}

static void release(void *context)
{
	struct import *import = context;

	import_detach(import);
	kvfree(import->pieces);
}

static void *bounce(void *context)
{
	struct import *import = context;

	return import->engine ? import->engine->bounce : NULL;
}

static int driver_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct engine *engine = devm_kzalloc(&pdev->dev, sizeof(*engine), GFP_KERNEL);
	int error;

	if (!engine)
		return -ENOMEM;
	error = engine_open(engine, pdev);
	if (!error)
		pci_set_drvdata(pdev, engine);
	return error;
}

static void lose_engine(void *context, void *engine)
{
	struct import *import = context;

	if (import->engine != engine)
		return;
	import_detach(import);
	import->engine = NULL;
}

static void driver_remove(struct pci_dev *pdev)
{
	struct engine *engine = pci_get_drvdata(pdev);

	mutex_lock(&control_lock);
	for_each_context(lose_engine, engine);
	pci_set_drvdata(pdev, NULL);
	mutex_unlock(&control_lock);
	engine_close(engine);
}

static struct pci_driver driver = {
	.name = KBUILD_MODNAME,
	.probe = driver_probe,
	.remove = driver_remove,
};

const struct command_file command_file = {
	.commands = commands,
	.driver = &driver,
	.context_bytes = sizeof(struct import),
	.open = open,
	.release = release,
	.bounce = bounce,
};

MODULE_DESCRIPTION("Imports dma-bufs for a device that does DMA");
MODULE_LICENSE("GPL");
