package optcache

const pluginName = "optcache"
