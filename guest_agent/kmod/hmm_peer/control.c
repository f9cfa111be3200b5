// SPDX-License-Identifier: GPL-2.0-only
/*
 * Device-private memory on a GPU's BAR, and devices that mirror a process's memory (HMM).
 *
 * Interface: open /dev/hmm_peer, write one command, read its answer; each open file mirrors one
 * range of its process's memory. At offset 0x100000 of the file are the 4 KiB of memory that the
 * device copies from and to.
 *
 *   take FUNCTION ADDRESS PAGES	migrate pages of the calling process into FUNCTION's memory
 *   owner FUNCTION			how many of its pages are used, and were taken back
 *   mirror FUNCTION ADDRESS PAGES [group=FUNCTION] [WORD...]	a device looks at them
 *   state				what it has now
 *   dma to|from PAGE SIZE [stale]	it copies into a page, or out of it
 *
 * "group" names the memory whose private pages the device takes for its own. Words: peer2peer (asks
 * other owners for peer-to-peer pages), and wrong ones: no-check, fake (peer.h). Functions are
 * driven by this module through driver_override: a memory (BAR 2) or an engine.
 */

#include <linux/module.h>

#include "peer.h"

LIST_HEAD(owners);

/* What a function of ours is: exactly one is set. */
struct peer {
	struct owner *owner;
	struct engine *engine;
};

static struct owner *owner_by_name(const char *name)
{
	struct peer *peer = named_data(name);

	if (IS_ERR(peer))
		return ERR_CAST(peer);
	return peer->owner ?: ERR_PTR(-EINVAL);
}

static int parse_range(char **words, unsigned long *start, unsigned long *pages)
{
	if (kstrtoul(words[0], 0, start) || kstrtoul(words[1], 0, pages) || !*pages ||
	    *pages > MIRROR_PAGES || !PAGE_ALIGNED(*start))
		return -EINVAL;
	return 0;
}

static int do_take(void *context, struct answer *answer, int count, char **words)
{
	unsigned long start, pages;
	struct owner *owner;
	int error;

	if (count != 3 || parse_range(words + 1, &start, &pages))
		return -EINVAL;
	owner = owner_by_name(words[0]);
	if (IS_ERR(owner))
		return PTR_ERR(owner);
	error = owner_take(owner, answer, start, pages);
	if (error)
		say_errno(answer, error);
	return 0;
}

static int do_owner(void *context, struct answer *answer, int count, char **words)
{
	struct owner *owner;

	if (count != 1)
		return -EINVAL;
	owner = owner_by_name(words[0]);
	if (IS_ERR(owner))
		return PTR_ERR(owner);
	say(answer, "used=%u to_ram=%d\n", owner_in_use(owner), atomic_read(&owner->to_ram));
	return 0;
}

static int parse_manners(struct manners *manners, int count, char **words)
{
	int i;

	*manners = (struct manners){};
	for (i = 0; i < count; i++) {
		if (!strcmp(words[i], "peer2peer")) {
			manners->peer2peer = true;
		} else if (!strcmp(words[i], "no-check")) {
			manners->peer2peer = manners->no_check = true;
		} else if (!strcmp(words[i], "fake")) {
			manners->peer2peer = manners->fake = true;
		} else if (!strncmp(words[i], "group=", 6)) {
			manners->group = owner_by_name(words[i] + 6);
			if (IS_ERR(manners->group))
				return PTR_ERR(manners->group);
		} else {
			return -EINVAL;
		}
	}
	return 0;
}

static int do_mirror(void *context, struct answer *answer, int count, char **words)
{
	struct mirror *mirror = context;
	unsigned long start, pages;
	struct manners manners;
	struct peer *peer;
	int error;

	if (count < 3 || parse_range(words + 1, &start, &pages))
		return -EINVAL;
	error = parse_manners(&manners, count - 3, words + 3);
	if (error)
		return error;
	peer = named_data(words[0]);
	if (IS_ERR(peer))
		return PTR_ERR(peer);
	if (!peer->engine)
		return -EINVAL;
	error = mirror_make(mirror, peer->engine, &manners, start, pages);
	if (error)
		say_errno(answer, error);
	else
		mirror_say(mirror, answer);
	return 0;
}

static int do_state(void *context, struct answer *answer, int count, char **words)
{
	mirror_say(context, answer);
	return 0;
}

static int do_dma(void *context, struct answer *answer, int count, char **words)
{
	bool to_memory, stale = count == 4 && !strcmp(words[3], "stale");
	unsigned long page;
	unsigned int size;

	if ((count != 3 && !stale) || kstrtoul(words[1], 0, &page) ||
	    kstrtouint(words[2], 0, &size))
		return -EINVAL;
	to_memory = !strcmp(words[0], "to");
	if (!to_memory && strcmp(words[0], "from"))
		return -EINVAL;
	say_errno(answer, mirror_dma(context, to_memory, page, size, stale));
	return 0;
}

static const struct command commands[] = {
	{ "take", do_take },
	{ "owner", do_owner },
	{ "mirror", do_mirror },
	{ "state", do_state },
	{ "dma", do_dma },
	{},
};

static void open(void *context)
{
	struct mirror *mirror = context;

	mutex_init(&mirror->lock);
}

static void release(void *context)
{
	mirror_end(context);
}

static void *bounce(void *context)
{
	struct mirror *mirror = context;

	return mirror->active ? mirror->engine->bounce : NULL;
}

static int driver_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct peer *peer = devm_kzalloc(&pdev->dev, sizeof(*peer), GFP_KERNEL);
	struct engine *engine = devm_kzalloc(&pdev->dev, sizeof(*engine), GFP_KERNEL);
	struct owner *owner;
	int error;

	if (!peer || !engine)
		return -ENOMEM;
	error = engine_open(engine, pdev);
	if (!error) {
		peer->engine = engine;
	} else if (error == -ENODEV) {
		owner = owner_open(pdev);
		if (IS_ERR(owner))
			return PTR_ERR(owner);
		peer->owner = owner;
		mutex_lock(&control_lock);
		list_add(&owner->node, &owners);
		mutex_unlock(&control_lock);
	} else {
		return error;
	}
	pci_set_drvdata(pdev, peer);
	return 0;
}

static void lose_peer(void *context, void *data)
{
	struct mirror *mirror = context;
	struct peer *peer = data;
	void *group = mirror->manners.group;

	if (mirror->engine == peer->engine || (group && group == peer->owner))
		mirror_end(mirror);
}

static void driver_remove(struct pci_dev *pdev)
{
	struct peer *peer = pci_get_drvdata(pdev);

	mutex_lock(&control_lock);
	for_each_context(lose_peer, peer);
	if (peer->owner)
		list_del(&peer->owner->node);
	pci_set_drvdata(pdev, NULL);
	mutex_unlock(&control_lock);
	/* Page faults go on taking pages back while the rest is evicted. */
	if (peer->owner)
		owner_close(peer->owner);
	else
		engine_close(peer->engine);
}

static struct pci_driver driver = {
	.name = KBUILD_MODNAME,
	.probe = driver_probe,
	.remove = driver_remove,
};

const struct command_file command_file = {
	.commands = commands,
	.driver = &driver,
	.context_bytes = sizeof(struct mirror),
	.open = open,
	.release = release,
	.bounce = bounce,
};

MODULE_DESCRIPTION("Device-private memory on a BAR, and devices that mirror a process's memory");
MODULE_LICENSE("GPL");
