/* Undefines the macros of vector.h. */
#undef vf
#undef vi
#undef vh
#undef vfu
#undef viu
#undef vhu
#undef SHUFFLE
#undef PARTS
#undef SET
#undef LANES
#undef AHEAD
