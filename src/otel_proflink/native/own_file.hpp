// SPDX-License-Identifier: Apache-2.0
//
// A descriptor that the application may close behind our back, as daemons do with all of them, and
// whose number may then be one of its own files: to be read, and closed, only while it is ours.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace otel_proflink {

struct FileIdentity {
    dev_t device = 0;
    ino_t inode = 0;
};

inline bool identify(int fd, FileIdentity* identity) noexcept {
    struct stat status;
    if (fd < 0 || fstat(fd, &status) != 0) return false;
    *identity = {status.st_dev, status.st_ino};
    return true;
}

class OwnFile {
  public:
    void open(const char* path) noexcept {
        fd_ = ::open(path, O_RDONLY | O_CLOEXEC);
        if (fd_ >= 0 && !identify(fd_, &identity_)) close_blindly();
    }
    // Also when it is not ours any more.
    bool is_open() const noexcept { return fd_ >= 0; }
    bool is_ours() const noexcept {
        FileIdentity now;
        return identify(fd_, &now) && now.inode == identity_.inode &&
               now.device == identity_.device;
    }
    int fd() const noexcept { return fd_; }
    const FileIdentity& identity() const noexcept { return identity_; }
    void close() noexcept {
        if (is_ours()) ::close(fd_);
        fd_ = -1;
    }
    // The descriptor is somebody else's business from now on.
    int release() noexcept {
        const int fd = fd_;
        fd_ = -1;
        return fd;
    }

  private:
    void close_blindly() noexcept {
        ::close(fd_);
        fd_ = -1;
    }

    int fd_ = -1;
    FileIdentity identity_;
};

}  // namespace otel_proflink
