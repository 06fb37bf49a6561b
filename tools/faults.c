/* Faults of a file system, for tools/chaos.py: cc -shared -fPIC -o faults.so faults.c -ldl, LD_PRELOAD=faults.so.
 *
 * Calls that write below a directory are counted; from `fault_arm` on the `at`-th of them fails or does less than
 * it was asked for. Counted are write, pwrite, pwritev, fsync, fdatasync, ftruncate, rename, mkdir, and open where
 * it creates. Reads below another directory are counted alike where the kind is one of reads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NONE, FULL, BROKEN, INTERRUPTED, SHORT, SHORT_READ, BROKEN_READ };

static char below[PATH_MAX];
static long at, count, jump_after, told;
static int kind;
static time_t jump;

void fault_arm(const char *directory, long number, int what) {
  snprintf(below, sizeof below, "%s", directory);
  at = number;
  kind = what;
  count = 0;
}
void fault_clock(long after, long seconds) {
  jump_after = after;
  jump = seconds;
}
long fault_count(void) { return count; }

#define REAL(name, type, ...)              \
  static type (*real)(__VA_ARGS__) = NULL; \
  if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

static int inside(const char *path) { return below[0] && !strncmp(path, below, strlen(below)); }
static int inside_of(int descriptor) {
  char link[64], path[PATH_MAX];
  if (!below[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return inside(path);
}
/* What happens to this call: its kind of fault, or NONE. A full disk stays full. */
static int fate(int mine, int reads) {
  if (!mine || reads != (kind >= SHORT_READ)) return NONE;
  long now = __sync_add_and_fetch(&count, 1);
  if (at && (now == at || (kind == FULL && now > at))) return kind;
  return NONE;
}
static int error_of(int what) {
  errno = what == FULL ? ENOSPC : what == INTERRUPTED ? EINTR : EIO;
  return -1;
}
static size_t part(int what, size_t size) {
  return (what == SHORT || what == SHORT_READ) && size > 1 ? size / 2 : size;
}
static int fails(int what) { return what == FULL || what == BROKEN || what == INTERRUPTED || what == BROKEN_READ; }

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write, ssize_t, int, const void *, size_t);
  int what = fate(inside_of(fd), 0);
  return fails(what) ? error_of(what) : real(fd, data, part(what, size));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t start) {
  REAL(pwrite64, ssize_t, int, const void *, size_t, off64_t);
  int what = fate(inside_of(fd), 0);
  return fails(what) ? error_of(what) : real(fd, data, part(what, size), start);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t start) { return pwrite64(fd, data, size, start); }
ssize_t writev(int fd, const struct iovec *parts, int many) {
  REAL(writev, ssize_t, int, const struct iovec *, int);
  int what = fate(inside_of(fd), 0);
  if (fails(what)) return error_of(what);
  return what == SHORT && many > 0 ? write(fd, parts[0].iov_base, part(what, parts[0].iov_len)) : real(fd, parts, many);
}
int fsync(int fd) {
  REAL(fsync, int, int);
  int what = fate(inside_of(fd), 0);
  return fails(what) ? error_of(what) : real(fd);
}
int fdatasync(int fd) {
  REAL(fdatasync, int, int);
  int what = fate(inside_of(fd), 0);
  return fails(what) ? error_of(what) : real(fd);
}
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64, int, int, off64_t);
  int what = fate(inside_of(fd), 0);
  return fails(what) ? error_of(what) : real(fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int rename(const char *from, const char *to) {
  REAL(rename, int, const char *, const char *);
  int what = fate(inside(to), 0);
  return fails(what) && what != INTERRUPTED ? error_of(what) : real(from, to);
}
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir, int, const char *, mode_t);
  int what = fate(inside(path), 0);
  return fails(what) && what != INTERRUPTED ? error_of(what) : real(path, mode);
}
static int opened(const char *name, const char *path, int flags, mode_t mode) {
  int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
  int what = fate((flags & O_CREAT) && inside(path), 0);
  return fails(what) ? error_of(what) : real(path, flags, mode);
}
int open(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = va_arg(rest, int);
  va_end(rest);
  return opened("open", path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  va_list rest;
  va_start(rest, flags);
  mode_t mode = va_arg(rest, int);
  va_end(rest);
  return opened("open64", path, flags, mode);
}
ssize_t read(int fd, void *data, size_t size) {
  REAL(read, ssize_t, int, void *, size_t);
  int what = fate(kind >= SHORT_READ && inside_of(fd), 1);
  return fails(what) ? error_of(what) : real(fd, data, part(what, size));
}
ssize_t pread64(int fd, void *data, size_t size, off64_t start) {
  REAL(pread64, ssize_t, int, void *, size_t, off64_t);
  int what = fate(kind >= SHORT_READ && inside_of(fd), 1);
  return fails(what) ? error_of(what) : real(fd, data, part(what, size), start);
}
ssize_t pread(int fd, void *data, size_t size, off_t start) { return pread64(fd, data, size, start); }
ssize_t preadv64(int fd, const struct iovec *parts, int many, off64_t start) {
  REAL(preadv64, ssize_t, int, const struct iovec *, int, off64_t);
  int what = fate(kind >= SHORT_READ && inside_of(fd), 1);
  if (fails(what)) return error_of(what);
  if (what == SHORT_READ && many > 0) {
    REAL(pread64, ssize_t, int, void *, size_t, off64_t);
    return real(fd, parts[0].iov_base, part(what, parts[0].iov_len), start);
  }
  return real(fd, parts, many, start);
}
ssize_t preadv(int fd, const struct iovec *parts, int many, off_t start) { return preadv64(fd, parts, many, start); }
int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime, int, clockid_t, struct timespec *);
  int code = real(clock, now);
  if (jump && clock == CLOCK_REALTIME && __sync_add_and_fetch(&told, 1) > jump_after) now->tv_sec += jump;
  return code;
}
