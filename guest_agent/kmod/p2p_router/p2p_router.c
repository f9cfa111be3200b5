// SPDX-License-Identifier: GPL-2.0-only
/*
 * Lets QEMU's devices reach one another below a PCIe switch, as the switch of a real machine does.
 *
 * A switch whose ports do not redirect (PCI Express Base Specification 6.0, 6.12.3) sends a request
 * for an address below it straight there, past the IOMMU; Linux then gives a driver bus addresses
 * (drivers/pci/p2pdma.c). QEMU sends every request to the IOMMU. So, for each function that a
 * driver uses and each BAR of another function below a common bridge that does not redirect, this
 * module maps the BAR at its own bus address in the function's DMA domain. Nothing else can be
 * there: the kernel keeps the host bridge's windows out of what it hands out (iova_reserve_pci_windows
 * in drivers/iommu/dma-iommu.c).
 *
 * A window exists only while some function of its IOMMU group is bound to a driver that uses the
 * kernel's DMA API: so long the group's domain can be neither replaced nor given to a VFIO user.
 * Functions that VFIO owns are routed by their user (VFIO_IOMMU_MAP_DMA of the same windows); what
 * these are is shown as "outside".
 *
 * Windows belong to a group's domain: a function that shares a group with one that may pass gets
 * the windows too. Below redirecting ports every function has a group of its own.
 *
 * /proc/p2p_router shows all of it (lines of key=value words); writing "rescan" to it has
 * the ACS settings and BARs read again, which change without an event. Binding, unbinding, plugging
 * and unplugging are followed by themselves.
 */

#include <linux/device.h>
#include <linux/iommu.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/sort.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#define NAME		"p2p_router"
#define REDIRECT	(PCI_ACS_RR | PCI_ACS_CR | PCI_ACS_EC)
/* A plugged function is announced before it has its addresses. */
#define SETTLE_MS	100

static char *skip[8];
static int skipped;
module_param_array(skip, charp, &skipped, 0444);
MODULE_PARM_DESC(skip, "initiators that route by themselves, by vendor:device in hexadecimal");

/* A function that a driver uses through the DMA API. */
struct initiator {
	struct list_head list;
	struct pci_dev *pdev;
};

/* One initiator and one BAR that it may reach below the IOMMU. */
struct pair {
	struct iommu_domain *domain;
	int group;
	dma_addr_t start, end;		/* whole pages; end is the first byte after */
	phys_addr_t physical;
	int bar;
	char initiator[16], peer[16];
};

struct window {
	struct list_head list;
	struct iommu_domain *domain;
	int group;
	dma_addr_t start, end;
	phys_addr_t physical;
	int error;			/* why it is not installed */
	bool wanted;
};

static DEFINE_MUTEX(lock);		/* taken after device_lock and the PCI rescan lock */
static LIST_HEAD(initiators);
static LIST_HEAD(windows);
static struct pair *pairs;
static size_t pair_count, pair_room;
static bool stopping;

/* The ACS control register, 0 for a port that has none; *OFFSET is then 0 too. */
static u16 acs_control(struct pci_dev *pdev, int *offset)
{
	u16 control = 0;

	*offset = pci_find_ext_capability(pdev, PCI_EXT_CAP_ID_ACS);
	if (*offset)
		pci_read_config_word(pdev, *offset + PCI_ACS_CTRL, &control);
	return control;
}

/* With egress control the port's vector says to which other ports it applies. */
static bool egress_controlled(struct pci_dev *port, int offset, struct pci_dev *egress)
{
	u32 number = 0, vector = 0;
	u16 capability = 0;
	unsigned int bits;

	pcie_capability_read_dword(egress, PCI_EXP_LNKCAP, &number);
	number >>= 24;
	pci_read_config_word(port, offset + PCI_ACS_CAP, &capability);
	bits = capability >> 8 ?: 256;
	if (number < bits)
		pci_read_config_dword(port, offset + PCI_ACS_EGRESS_CTL_V + number / 32 * 4,
				      &vector);
	return vector >> number % 32 & 1;
}

/* What a switch does with a request that comes in through INGRESS for something below EGRESS. */
static bool switched(struct pci_dev *ingress, struct pci_dev *egress)
{
	int offset;
	u16 control = acs_control(ingress, &offset);

	if (control & PCI_ACS_EC)
		return !egress_controlled(ingress, offset, egress);
	return !(control & PCI_ACS_RR);
}

/*
 * Whether a request reaches the peer below the root complex. The port at which it enters the
 * switch that leads to both decides; ACS of the peer's port does not matter to a request, and a
 * port further down has sent it up already (table 6-11). Functions of one slot are taken for
 * routed, as drivers/pci/p2pdma.c does, unless the port above them redirects.
 */
static bool routed(struct pci_dev *initiator, struct pci_dev *peer)
{
	struct pci_dev *below, *bridge, *other, *other_bridge;
	int offset;

	for (below = initiator; (bridge = pci_upstream_bridge(below)); below = bridge)
		for (other = peer; (other_bridge = pci_upstream_bridge(other)); other = other_bridge) {
			if (bridge != other_bridge)
				continue;
			if (below == initiator || other == peer)
				return !(acs_control(bridge, &offset) & REDIRECT);
			return switched(below, other);
		}
	return false;
}

static bool routes_itself(struct pci_dev *pdev)
{
	char name[16];
	int i;

	snprintf(name, sizeof(name), "%04x:%04x", pdev->vendor, pdev->device);
	for (i = 0; i < skipped; i++)
		if (!strcasecmp(skip[i], name))
			return true;
	return false;
}

static bool uses_dma_api(struct pci_dev *pdev)
{
	return pdev->dev.driver && pdev->hdr_type == PCI_HEADER_TYPE_NORMAL &&
	       !to_pci_driver(pdev->dev.driver)->driver_managed_dma;
}

static int add_pair(struct pci_dev *initiator, struct iommu_domain *domain, int group,
		    struct pci_dev *peer, int bar)
{
	struct pair *pair;

	if (pair_count == pair_room) {
		size_t room = pair_room ? 2 * pair_room : 64;
		struct pair *more = krealloc_array(pairs, room, sizeof(*pairs), GFP_KERNEL);

		if (!more)
			return -ENOMEM;
		pairs = more;
		pair_room = room;
	}
	pair = &pairs[pair_count++];
	pair->domain = domain;
	pair->group = group;
	pair->start = ALIGN_DOWN(pci_bus_address(peer, bar), PAGE_SIZE);
	pair->end = ALIGN(pci_bus_address(peer, bar) + pci_resource_len(peer, bar), PAGE_SIZE);
	pair->physical = ALIGN_DOWN(pci_resource_start(peer, bar), PAGE_SIZE);
	pair->bar = bar;
	strscpy(pair->initiator, pci_name(initiator), sizeof(pair->initiator));
	strscpy(pair->peer, pci_name(peer), sizeof(pair->peer));
	return 0;
}

static bool is_reachable(struct pci_dev *peer, int bar)
{
	unsigned long flags = pci_resource_flags(peer, bar);

	return (flags & IORESOURCE_MEM) && !(flags & (IORESOURCE_UNSET | IORESOURCE_DISABLED)) &&
	       pci_resource_len(peer, bar) && pci_resource_start(peer, bar);
}

static int add_pairs(struct pci_dev *initiator, const struct pci_dev *leaving)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(&initiator->dev);
	struct pci_dev *peer = NULL;
	struct iommu_group *group;
	int number, bar;

	if (!domain || !(domain->type & __IOMMU_DOMAIN_DMA_API))
		return 0;	/* bus addresses pass as they are */
	group = iommu_group_get(&initiator->dev);
	number = iommu_group_id(group);
	iommu_group_put(group);
	for_each_pci_dev(peer) {
		if (peer == initiator || peer == leaving ||
		    peer->hdr_type != PCI_HEADER_TYPE_NORMAL || !routed(initiator, peer))
			continue;
		for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
			if (is_reachable(peer, bar) &&
			    add_pair(initiator, domain, number, peer, bar)) {
				pci_dev_put(peer);
				return -ENOMEM;
			}
	}
	return 0;
}

static int by_window(const void *left, const void *right)
{
	const struct pair *a = left, *b = right;

	if (a->domain != b->domain)
		return a->domain < b->domain ? -1 : 1;
	if (a->start != b->start)
		return a->start < b->start ? -1 : 1;
	return a->end < b->end ? -1 : a->end > b->end;
}

/* The window as the pairs want it: found among the present ones, or a new one. */
static int want(struct iommu_domain *domain, int group, dma_addr_t start, dma_addr_t end,
		phys_addr_t physical)
{
	struct window *window;

	list_for_each_entry(window, &windows, list)
		if (window->domain == domain && window->start == start && window->end == end) {
			window->wanted = true;
			return 0;
		}
	window = kzalloc(sizeof(*window), GFP_KERNEL);
	if (!window)
		return -ENOMEM;
	window->domain = domain;
	window->group = group;
	window->start = start;
	window->end = end;
	window->physical = physical;
	window->error = 1;	/* not yet */
	window->wanted = true;
	list_add_tail(&window->list, &windows);
	return 0;
}

/* Overlapping pairs (BARs that share a page, initiators that share a group) are one window. */
static int want_all(void)
{
	size_t first, next;
	int error = 0;

	sort(pairs, pair_count, sizeof(*pairs), by_window, NULL);
	for (first = 0; first < pair_count && !error; first = next) {
		dma_addr_t end = pairs[first].end;

		for (next = first + 1; next < pair_count; next++) {
			if (pairs[next].domain != pairs[first].domain || pairs[next].start >= end)
				break;
			end = max(end, pairs[next].end);
		}
		error = want(pairs[first].domain, pairs[first].group, pairs[first].start, end,
			     pairs[first].physical);
	}
	return error;
}

static void install(struct window *window)
{
	size_t size = window->end - window->start;

	if (iommu_iova_to_phys(window->domain, window->start))
		window->error = -EEXIST;
	else
		window->error = iommu_map(window->domain, window->start, window->physical, size,
					  IOMMU_READ | IOMMU_WRITE | IOMMU_MMIO, GFP_KERNEL);
	if (window->error)
		pr_err(NAME ": window %pad of group %d: error %d\n", &window->start,
		       window->group, window->error);
}

static void drop(struct window *window)
{
	if (!window->error)
		iommu_unmap(window->domain, window->start, window->end - window->start);
	list_del(&window->list);
	kfree(window);
}

/* Make the windows what the tree asks for now. LEAVING is a function that is about to go. */
static void recompute(const struct pci_dev *leaving)
{
	struct window *window, *more;
	struct initiator *initiator;
	int error = 0;

	lockdep_assert_held(&lock);
	pair_count = 0;
	list_for_each_entry(window, &windows, list)
		window->wanted = false;
	if (!stopping)
		list_for_each_entry(initiator, &initiators, list)
			error = error ?: add_pairs(initiator->pdev, leaving);
	error = error ?: want_all();
	if (error)
		pr_err(NAME ": error %d; some pairs are not routed\n", error);
	list_for_each_entry_safe(window, more, &windows, list)
		if (!window->wanted)
			drop(window);
	list_for_each_entry(window, &windows, list)
		if (window->error)
			install(window);
}

static void add_initiator(struct pci_dev *pdev)
{
	struct initiator *initiator;

	lockdep_assert_held(&lock);
	if (!uses_dma_api(pdev) || routes_itself(pdev))
		return;
	list_for_each_entry(initiator, &initiators, list)
		if (initiator->pdev == pdev)
			return;
	initiator = kzalloc(sizeof(*initiator), GFP_KERNEL);
	if (!initiator)
		return;
	initiator->pdev = pci_dev_get(pdev);
	list_add_tail(&initiator->list, &initiators);
}

static void remove_initiator(const struct pci_dev *pdev)
{
	struct initiator *initiator, *more;

	lockdep_assert_held(&lock);
	list_for_each_entry_safe(initiator, more, &initiators, list)
		if (!pdev || initiator->pdev == pdev) {
			list_del(&initiator->list);
			pci_dev_put(initiator->pdev);
			kfree(initiator);
		}
}

static void rescan(struct work_struct *work)
{
	/* Whoever plugs or unplugs holds this until all addresses are assigned. */
	pci_lock_rescan_remove();
	mutex_lock(&lock);
	recompute(NULL);
	mutex_unlock(&lock);
	pci_unlock_rescan_remove();
}

static DECLARE_DELAYED_WORK(settle, rescan);

static int on_event(struct notifier_block *block, unsigned long event, void *data)
{
	struct pci_dev *pdev = to_pci_dev((struct device *)data);

	mutex_lock(&lock);
	switch (event) {
	case BUS_NOTIFY_BOUND_DRIVER:
		add_initiator(pdev);
		recompute(NULL);
		break;
	case BUS_NOTIFY_UNBIND_DRIVER:	/* the domain is still the driver's */
		remove_initiator(pdev);
		recompute(NULL);
		break;
	case BUS_NOTIFY_DEL_DEVICE:
		remove_initiator(pdev);
		recompute(pdev);
		break;
	case BUS_NOTIFY_ADD_DEVICE:
		schedule_delayed_work(&settle, msecs_to_jiffies(SETTLE_MS));
		break;
	}
	mutex_unlock(&lock);
	return NOTIFY_DONE;
}

static struct notifier_block notifier = { .notifier_call = on_event };

/* What a function may reach that its driver maps for itself (VFIO), for its user to install. */
static void show_outside(struct seq_file *file, struct pci_dev *initiator)
{
	struct pci_dev *peer = NULL;
	int bar;

	for_each_pci_dev(peer) {
		if (peer == initiator || peer->hdr_type != PCI_HEADER_TYPE_NORMAL ||
		    !routed(initiator, peer))
			continue;
		for (bar = 0; bar < PCI_STD_NUM_BARS; bar++)
			if (is_reachable(peer, bar))
				seq_printf(file,
					   "outside initiator=%s peer=%s bar=%d start=0x%llx size=0x%llx\n",
					   pci_name(initiator), pci_name(peer), bar,
					   (unsigned long long)pci_bus_address(peer, bar),
					   (unsigned long long)pci_resource_len(peer, bar));
	}
}

static int show(struct seq_file *file, void *unused)
{
	struct initiator *initiator;
	struct pci_dev *pdev = NULL;
	struct window *window;
	size_t i;

	mutex_lock(&lock);
	list_for_each_entry(initiator, &initiators, list) {
		struct iommu_domain *domain = iommu_get_domain_for_dev(&initiator->pdev->dev);
		bool translated = domain && (domain->type & __IOMMU_DOMAIN_DMA_API);

		seq_printf(file, "initiator %s translated=%d\n", pci_name(initiator->pdev),
			   translated);
	}
	list_for_each_entry(window, &windows, list)
		seq_printf(file, "window group=%d start=0x%llx size=0x%llx error=%d\n",
			   window->group, (unsigned long long)window->start,
			   (unsigned long long)(window->end - window->start), -window->error);
	for (i = 0; i < pair_count; i++)
		seq_printf(file, "pair initiator=%s peer=%s bar=%d start=0x%llx size=0x%llx\n",
			   pairs[i].initiator, pairs[i].peer, pairs[i].bar,
			   (unsigned long long)pairs[i].start,
			   (unsigned long long)(pairs[i].end - pairs[i].start));
	mutex_unlock(&lock);
	for_each_pci_dev(pdev) {
		device_lock(&pdev->dev);	/* comes before the mutex */
		if (pdev->dev.driver && pdev->hdr_type == PCI_HEADER_TYPE_NORMAL &&
		    to_pci_driver(pdev->dev.driver)->driver_managed_dma && !routes_itself(pdev))
			show_outside(file, pdev);
		device_unlock(&pdev->dev);
	}
	return 0;
}

static int router_open(struct inode *inode, struct file *file)
{
	return single_open(file, show, NULL);
}

static ssize_t router_write(struct file *file, const char __user *data, size_t size, loff_t *ppos)
{
	char text[16];

	if (!size || size >= sizeof(text))
		return -EINVAL;
	if (copy_from_user(text, data, size))
		return -EFAULT;
	text[size] = '\0';
	if (strcmp(strim(text), "rescan"))
		return -EINVAL;
	rescan(NULL);
	return size;
}

static const struct proc_ops operations = {
	.proc_open = router_open,
	.proc_read = seq_read,
	.proc_write = router_write,
	.proc_lseek = seq_lseek,
	.proc_release = single_release,
};

static int __init router_init(void)
{
	struct pci_dev *pdev = NULL;
	int error;

	if (!proc_create(NAME, 0600, NULL, &operations))
		return -ENOMEM;
	error = bus_register_notifier(&pci_bus_type, &notifier);
	if (error) {
		remove_proc_entry(NAME, NULL);
		return error;
	}
	for_each_pci_dev(pdev) {
		device_lock(&pdev->dev);	/* no driver comes or goes meanwhile */
		mutex_lock(&lock);
		add_initiator(pdev);
		mutex_unlock(&lock);
		device_unlock(&pdev->dev);
	}
	rescan(NULL);
	return 0;
}
module_init(router_init);

static void __exit router_exit(void)
{
	remove_proc_entry(NAME, NULL);
	/* While events still come, so that no window outlives the binding that it rests on. */
	mutex_lock(&lock);
	stopping = true;
	recompute(NULL);
	mutex_unlock(&lock);
	bus_unregister_notifier(&pci_bus_type, &notifier);
	cancel_delayed_work_sync(&settle);
	mutex_lock(&lock);
	remove_initiator(NULL);
	mutex_unlock(&lock);
	kfree(pairs);
}
module_exit(router_exit);

MODULE_DESCRIPTION("Routes peer-to-peer requests below PCIe switches as the switches would");
MODULE_LICENSE("GPL");
