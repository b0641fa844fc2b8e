/* Build: gcc -shared -fPIC … -Wl,-soname,libgnutls.so.30 -Wl,--version-script=native/gnutls.map (setup.py does it)
 *
 * In bundles it is `libgnutls.so.30`. CRIU is linked against that for page servers over TLS, which we never start; to start
 * itself it needs this one variable. Loading GnuTLS and the eight libraries that it needs would take 2 ms of every wake.
 *
 * A CRIU that calls GnuTLS ends ("undefined symbol"), and one that can't start with this library is given the real one
 * (bundle.py).
 */
#include <stdlib.h>

void (*gnutls_free)(void *) = free;
