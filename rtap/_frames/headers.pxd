# SPDX-License-Identifier: BSD-3-Clause
"""Numbers of the headers in frames: lengths, types, flags and places. No code."""


cdef enum:
    # Ethernet
    MAC_LEN = 6
    ADDRESSES_LEN = 12          # in front of the tags
    ETHER_HDR_LEN = 14
    VLAN_HDR_LEN = 4
    ETHERTYPE_IPV4 = 0x0800
    ETHERTYPE_ARP = 0x0806
    ETHERTYPE_TEB = 0x6558      # Ethernet in GRE
    ETHERTYPE_VLAN = 0x8100
    ETHERTYPE_IPV6 = 0x86DD
    ETHERTYPE_QINQ = 0x88A8
    ETHERTYPE_LLDP = 0x88CC
    ETHERTYPE_1588 = 0x88F7

    # IP
    IPV4_HDR_LEN = 20           # without options
    IPV4_OFFSET = 0x1fff        # of a fragment
    IPV4_FRAGMENT = 0x3fff      # offset and "more fragments"
    IPV6_HDR_LEN = 40
    IPPROTO_HOPOPTS = 0
    IPPROTO_ICMP = 1
    IPPROTO_IGMP = 2
    IPPROTO_IPIP = 4
    IPPROTO_TCP = 6
    IPPROTO_UDP = 17
    IPPROTO_IPV6 = 41
    IPPROTO_ROUTING = 43
    IPPROTO_FRAGMENT = 44
    IPPROTO_GRE = 47
    IPPROTO_AH = 51
    IPPROTO_ICMPV6 = 58
    IPPROTO_DSTOPTS = 60
    IPPROTO_SCTP = 132
    IPPROTO_MH = 135

    # TCP and UDP
    TCP_CSUM_OFFSET = 16
    UDP_CSUM_OFFSET = 6
    TCP_FIN = 0x01              # in the fourteenth byte of the TCP header
    TCP_SYN = 0x02
    TCP_RST = 0x04
    TCP_PSH = 0x08
    TCP_ACK = 0x10
    TCP_URG = 0x20
    TCP_CWR = 0x80
    VXLAN_PORT = 4789
    VXLAN_LEN = 16              # with its UDP header
