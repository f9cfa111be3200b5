// SPDX-License-Identifier: GPL-2.0-only
/* What bridges do with a request for an address below them (PCI Express Base Specification 6.0). */

#include <linux/pci.h>

#include "router.h"

#define REDIRECT	(PCI_ACS_RR | PCI_ACS_CR | PCI_ACS_EC)

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
bool routed(struct pci_dev *initiator, struct pci_dev *peer)
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

bool is_reachable(struct pci_dev *peer, int bar)
{
	unsigned long flags = pci_resource_flags(peer, bar);

	return (flags & IORESOURCE_MEM) && !(flags & (IORESOURCE_UNSET | IORESOURCE_DISABLED)) &&
	       pci_resource_len(peer, bar) && pci_resource_start(peer, bar);
}
